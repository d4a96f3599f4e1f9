"""Positions beside embeddings: exact in every dtype, the same whether a prompt comes whole or in chunks."""

from __future__ import annotations

import pytest
import torch
from tokenprune_vllm.positions import append, one_axis, split, written


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_survive_any_dtype(dtype: torch.dtype, axes: int) -> None:
    position = torch.arange(65536).view(-1, 1) + torch.tensor([0, -7, 5])[:axes]
    position = position.clamp(0, 65535)
    hidden = torch.randn(len(position), 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    back, found = split(append(hidden, position), axes)
    assert torch.equal(back, hidden) and torch.equal(found, position)


TEXTS = {"between text": (2, 3, 2), "side by side": (2, 0, 2), "at the ends": (0, 3, 0)}


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_chunks_give_what_the_whole_prompt_gives(texts: tuple[int, ...], chunk: int) -> None:
    """Two pictures of 9 and 12 tokens, 4 of each kept, against positions of the untouched prompt; and once more, as
    after a preemption."""
    kept, totals = [[0, 3, 4, 8], [1, 2, 6, 11]], [9, 12]
    untouched, pictures, media, end = list(range(texts[0])), [], [False] * texts[0], texts[0]
    for own, total, text in zip(kept, totals, texts[1:], strict=True):
        pictures.append((len(media), 4, total))
        media += [True] * 4 + [False] * text
        untouched += [end + place for place in own] + [end + total + step for step in range(text)]
        end += total + text
    positions = one_axis(len(media), pictures)
    assert positions[2].unique().tolist() == [end]
    for _ in range(2):
        rows = iter(torch.tensor(kept).view(-1, 1))
        for start in range(0, len(media), chunk):
            own_rows = [next(rows) for slot in range(start, min(start + chunk, len(media))) if media[slot]]
            offsets = [torch.stack(own_rows)] if own_rows else []
            positions[:1] = written(positions[:1], torch.tensor(media), positions[1], offsets, start)
        assert positions[0].tolist() == untouched
