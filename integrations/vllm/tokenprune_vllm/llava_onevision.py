"""LLaVA-OneVision: a picture is its overview, then tiles whose rows end in a newline token. A recipe chooses among all
of them together, newlines included, as `tokenprune.attach` does."""

from __future__ import annotations

from functools import cached_property

from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.core.grids import Grid, Tiles
from tokenprune.errors import RecipeError
from tokenprune.serving import PictureReducer
from tokenprune_vllm.one_axis import OneAxis
from tokenprune_vllm.settings import reducer_of

ASPECT = "anyres_max_9"
"""The one way of laying out tiles that vLLM knows."""


class Info(LlavaOnevisionProcessingInfo):
    @cached_property
    def reducer(self) -> PictureReducer:
        return reducer_of(self.get_hf_config())

    def get_supported_mm_limits(self):
        return {"image": None, "video": 0}

    def grids(self, height: int, width: int) -> list[Grid]:
        """Of a picture of so many pixels."""
        config = self.get_hf_config()
        told = config.vision_config.model_type, config.vision_feature_select_strategy, config.vision_aspect_ratio
        if told != ("siglip_vision_model", "full", ASPECT):
            raise RecipeError(
                "tokenprune: LLaVA-OneVision: expected a SigLIP tower, vision_feature_select_strategy 'full' and "
                f"vision_aspect_ratio {ASPECT!r}, got {', '.join(map(repr, told))}"
            )
        side = config.vision_config.image_size // config.vision_config.patch_size
        down, across = get_anyres_image_grid_shape(
            (height, width), config.image_grid_pinpoints, config.vision_config.image_size
        )
        patches, rows = self._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=down,
            num_patch_width=across,
        )
        return [(1, side, side), Tiles(1, rows, patches // rows + 1)]

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.reducer.kept(self.grids(image_height, image_width))


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor, info=Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class TokenpruneLlavaOnevision(OneAxis, LlavaOnevisionForConditionalGeneration):
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={  # as transformers 5.20 and newer save them
            f"vision_tower.{part}": f"vision_tower.vision_model.{part}"
            for part in ("embeddings.", "encoder.", "post_layernorm.", "head.")
        }
    )

    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.info = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config)

    def grids(self, data):
        return self.info.grids(*data["image_sizes"].data.tolist())

    def _process_image_input(self, image_input):
        features = super()._process_image_input(image_input)
        if image_input["type"] == "image_embeds":
            return features  # reduced by whoever made them: tp.encode
        sizes = image_input["image_sizes"].tolist()
        return [self.reduced(one, self.info.grids(*size)) for one, size in zip(features, sizes, strict=True)]
