"""What LLaVA models have in common: positions on one axis. ``original`` rides on M-RoPE whose sections are all in the
first axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.grids import Grid
from tokenprune_vllm.positions import append, one_axis, split, written
from tokenprune_vllm.settings import check_server, reducer_of


class OneAxis:
    """Before a LLaVA model of vLLM among the bases of a class."""

    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.reducer = reducer_of(self.config)
        check_server(vllm_config, self.reducer, renumbers=True)

    def grids(self, data: Any) -> Sequence[Grid]:
        """The grids of one picture, from what the processor made of it."""
        raise NotImplementedError

    def reduced(self, hidden: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Survivors of a picture ``[N, D]``, with their places behind where they keep their positions."""
        left, kept = self.reducer.prune(hidden, grids)
        return append(left, kept[:, None]) if self.reducer.positions == "original" else left

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        pictures = [
            (
                feature.mm_position.offset,
                feature.mm_position.length,
                sum(frames * rows * columns for frames, rows, columns in self.grids(feature.data)),
            )
            for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        ]
        positions = one_axis(len(input_tokens), pictures)
        return positions, sum(total - kept for _, kept, total in pictures)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        length = len(input_ids)
        delta = int(mrope_positions[2, 0]) - length
        if not len(multimodal_embeddings):
            return multimodal_embeddings, mrope_positions, delta  # asked at every step of every request
        pairs = [split(rows, 1) for rows in multimodal_embeddings]
        media = torch.as_tensor(input_ids, device=mrope_positions.device) == self.config.image_token_index
        new = mrope_positions.clone()
        new[:1, :length] = written(
            new[:1, :length], media, new[1, :length], [offsets for _, offsets in pairs], num_computed_tokens
        )
        return [rows for rows, _ in pairs], new, delta
