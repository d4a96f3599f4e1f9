"""Positions beside embeddings: exact in every dtype, the same whether a prompt comes whole or in chunks."""

from __future__ import annotations

import pytest
import torch
from tokenprune_vllm.positions import append, one_axis_base, split, written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_survive_any_dtype(dtype: torch.dtype) -> None:
    position = torch.arange(65536).view(-1, 1).expand(-1, 3)
    hidden = torch.randn(len(position), 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    back, found = split(append(hidden, position))
    assert torch.equal(back, hidden) and torch.equal(found, position)


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_chunks_give_what_the_whole_prompt_gives(chunk: int) -> None:
    """Two pictures of 9 tokens, 4 of each kept, in a prompt of text: against positions of the untouched prompt."""
    kept = [torch.tensor([0, 3, 4, 8]), torch.tensor([1, 2, 6, 7])]
    media = torch.tensor([False] * 2 + [True] * 4 + [False] * 3 + [True] * 4 + [False] * 2)
    untouched = [[0, 1], (2 + kept[0]).tolist(), [11, 12, 13], (14 + kept[1]).tolist(), [23, 24]]
    base = one_axis_base(media, total=9, kept=4)
    positions = base.expand(3, -1).clone()
    rows = iter(torch.cat(kept)[:, None].expand(-1, 3))
    for start in range(0, len(media), chunk):
        own = [next(rows) for slot in range(start, min(start + chunk, len(media))) if media[slot]]
        offsets = [torch.stack(own)] if own else []
        positions = written(positions, media, base, offsets, start)
    assert positions.tolist() == [[place for piece in untouched for place in piece]] * 3
