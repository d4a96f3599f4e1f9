"""Qwen2.5-VL, and Qwen3-VL with its DeepStack."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune_vllm.three_axes import ReducedInfo, ReducedProcessor, ThreeAxes


class Info2_5(ReducedInfo, Qwen2_5_VLProcessingInfo):
    pass


class Processor2_5(ReducedProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor2_5, info=Info2_5, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class TokenpruneQwen2_5_VL(ThreeAxes, Qwen2_5_VLForConditionalGeneration):
    pass


class Info3(ReducedInfo, Qwen3VLProcessingInfo):
    pass


class Processor3(ReducedProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Info3, dummy_inputs=Qwen3VLDummyInputsBuilder)
class TokenpruneQwen3VL(ThreeAxes, Qwen3VLForConditionalGeneration):
    pass
