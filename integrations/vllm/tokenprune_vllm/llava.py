"""LLaVA-1.5. ``positions: original`` rides on M-RoPE whose sections are all in one axis."""

from __future__ import annotations

from functools import cached_property

import torch
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
from tokenprune_vllm.positions import append, one_axis_base, split, written
from tokenprune_vllm.settings import check_server, reducer_of


def grid_of(config) -> tuple[int, int, int]:
    if config.vision_feature_select_strategy != "default":
        raise RecipeError("tokenprune: expected vision_feature_select_strategy 'default': patches without class token")
    side = config.vision_config.image_size // config.vision_config.patch_size
    return (1, side, side)


class Info(LlavaProcessingInfo):
    @cached_property
    def kept(self) -> int:
        config = self.get_hf_config()
        return reducer_of(config).kept(grid_of(config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.kept


@MULTIMODAL_REGISTRY.register_processor(LlavaMultiModalProcessor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class TokenpruneLlava(LlavaForConditionalGeneration):
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
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    supports_mrope = True

    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reducer, self.grid = reducer_of(self.config), grid_of(self.config)
        check_server(vllm_config, self.reducer, renumbers=True)
        self.total, self.kept = self.grid[1] * self.grid[2], self.reducer.kept(self.grid)

    def _process_image_input(self, image_input):
        features = super()._process_image_input(image_input)
        if isinstance(image_input, LlavaImageEmbeddingInputs):
            return features  # reduced by whoever made them: tp.encode
        return tuple(self._reduced(one) for one in features)

    def _reduced(self, hidden):
        left, kept = self.reducer.prune(hidden, self.grid)
        return append(left, kept[:, None].expand(-1, 3)) if self.reducer.positions == "original" else left

    def _media(self, ids, device=None):
        return torch.as_tensor(ids, device=device) == self.config.image_token_index

    def _beyond(self, media) -> int:
        """By how much positions run ahead of the prompt's length."""
        return int(media.sum()) // max(self.kept, 1) * (self.total - self.kept)

    def get_mrope_input_positions(self, input_tokens, mm_features):
        media = self._media(input_tokens)
        return one_axis_base(media, self.total, self.kept).expand(3, -1).clone(), self._beyond(media)

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        pairs = [split(rows) for rows in multimodal_embeddings]
        media = self._media(input_ids, mrope_positions.device)
        base = one_axis_base(media, self.total, self.kept)
        new = written(mrope_positions, media, base, [offsets for _, offsets in pairs], num_computed_tokens)
        return [rows for rows, _ in pairs], new, self._beyond(media)
