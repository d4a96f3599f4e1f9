"""LLaVA-1.5: every picture is one square of patches."""

from __future__ import annotations

from functools import cached_property

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.errors import RecipeError
from tokenprune_vllm.one_axis import OneAxis
from tokenprune_vllm.settings import reducer_of


def grids_of(config) -> list[tuple[int, int, int]]:
    if config.vision_feature_select_strategy != "default":
        raise RecipeError("tokenprune: expected vision_feature_select_strategy 'default': patches without class token")
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [(1, side, side)]


class Info(LlavaProcessingInfo):
    @cached_property
    def kept(self) -> int:
        config = self.get_hf_config()
        return reducer_of(config).kept(grids_of(config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.kept


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class TokenpruneLlava(OneAxis, LlavaForConditionalGeneration):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.vision_model.": "vision_tower.vision_model.",
            **{  # as transformers 5.20 and newer save them
                old + part: "vision_tower.vision_model." + part
                for old in ("vision_tower.", "model.vision_tower.")
                for part in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
            },
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def grids(self, data):
        return grids_of(self.config)

    def _process_image_input(self, image_input):
        features = super()._process_image_input(image_input)
        if isinstance(image_input, LlavaImageEmbeddingInputs):
            return features  # reduced by whoever made them: tp.encode
        return tuple(self.reduced(one, self.grids(None)) for one in features)
