"""What Qwen models have in common: survivors keep the rows and columns that they had on the picture (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptReplacement

from tokenprune.serving import PictureReducer
from tokenprune_vllm.positions import append, split, written
from tokenprune_vllm.settings import check_server, reducer_of


def merged(grid: Sequence[int], side: int) -> tuple[int, int, int]:
    """A grid of patches, in vision tokens."""
    frames, rows, columns = (int(each) for each in grid)
    return frames, rows // side, columns // side


class ReducedInfo:
    """Before the processing info of a Qwen model among the bases of a class."""

    @cached_property
    def reducer(self) -> PictureReducer:
        return reducer_of(self.get_hf_config())

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None, "video": 0}


class ReducedProcessor:
    """Before the processor of a Qwen model among the bases of a class: one placeholder a survivor."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list[Any]:
        config = self.info.get_hf_config()

        def replacement(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [config.image_token_id] * self.info.reducer.kept(
                merged(grid, config.vision_config.spatial_merge_size)
            )

        image = PromptReplacement(modality="image", target=[config.image_token_id], replacement=replacement)
        others = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [image if each.modality == "image" else each for each in others]


class ThreeAxes:
    """Before a Qwen model of vLLM among the bases of a class."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reducer = reducer_of(self.config)
        self.side = self.config.vision_config.spatial_merge_size
        check_server(vllm_config, self.reducer, renumbers=False)

    def _postprocess_image_embeds_evs(self, image_embeds_split: Sequence[Tensor], image_input: Any) -> tuple[Any, ...]:
        width = self.config.vision_config.out_hidden_size
        out = []
        for hidden, grid in zip(image_embeds_split, image_input["image_grid_thw"].tolist(), strict=True):
            shape = merged(grid, self.side)
            left, kept = self.reducer.prune(hidden[:, :width], shape)
            # DeepStack: what is added behind early layers stands behind the embedding, a level after the other.
            left = torch.cat([left, hidden[kept, width:]], dim=1)
            area, columns = shape[1] * shape[2], shape[2]
            out.append(append(left, torch.stack([kept // area, kept // columns % shape[1], kept % columns], dim=1)))
        return tuple(out)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        positions = torch.zeros(3, len(input_tokens), dtype=torch.long)
        last, at = 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            start, length = feature.mm_position.offset, feature.mm_position.length
            positions[:, at:start] = torch.arange(last, last + start - at)
            last += start - at
            positions[:, start : start + length] = last  # survivors add their cells when these are known
            # Text goes on behind the longest side of the untouched picture, as in transformers.
            last += max(merged(feature.data["image_grid_thw"].data.tolist(), self.side))
            at = start + length
        positions[:, at:] = torch.arange(last, last + len(input_tokens) - at)
        return positions, last - at

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        length = len(input_ids)
        # Behind a picture there is <|vision_end|>: the last token is text.
        delta = int(mrope_positions[0, length - 1]) + 1 - length
        if not len(multimodal_embeddings):
            return multimodal_embeddings, mrope_positions, delta  # asked at every step of every request
        pairs = [split(rows, 3) for rows in multimodal_embeddings]
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        media = ids == self.config.image_token_id
        # A picture begins one position behind the <|vision_start|> in front of it.
        before = torch.where(media, -1, torch.arange(length, device=ids.device)).cummax(0).values
        base = mrope_positions[0, before.clamp(min=0)] + 1
        full = mrope_positions.clone()
        full[:, :length] = written(
            mrope_positions[:, :length], media, base, [offsets for _, offsets in pairs], num_computed_tokens
        )
        return [rows for rows, _ in pairs], full, delta
