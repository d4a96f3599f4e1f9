"""Random vision tokens for property tests: ragged batches, several images, tokens already dropped, ties, all dtypes.

A `Sample` is one prompt without padding; `collate` makes `Tokens` of a batch of them. So what a part makes of row i of
a batch can be compared with what it makes of sample i alone, whatever stands in the padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.core.attention import RaterAttention, attention_from_qk
from tokenprune.core.grids import Grid
from tokenprune.core.needs import TOWER
from tokenprune.core.signals import Question, Signal, Signals
from tokenprune.core.tokens import Tokens

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH = 6, 4, 2, 4


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt: n vision tokens of its images, then t text tokens."""

    grids: tuple[Grid, ...]
    alive: tuple[int, ...]
    """Original indices of the n tokens that earlier stages left."""
    hidden: Tensor
    """[n, D]."""
    text: Tensor
    """[t, D]."""
    q: Tensor
    """[H, n + t, d]."""
    k: Tensor
    """[Hkv, n + t, d]."""

    @property
    def total(self) -> int:
        return sum(prod(grid) for grid in self.grids)


def sample(
    *grids: Grid, texts: int = 4, seed: int = 0, alive: Sequence[int] | None = None, ties: bool = False
) -> Sample:
    """A sample of random numbers; with `ties`, of so few different ones that equal tokens and equal scores abound."""
    total = sum(prod(grid) for grid in grids)
    left = tuple(range(total) if alive is None else alive)
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        if ties:
            return torch.randint(0, 2, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    length = len(left) + texts
    return Sample(
        grids=grids,
        alive=left,
        hidden=numbers(len(left), WIDTH),
        text=numbers(texts, WIDTH),
        q=2 * numbers(HEADS, length, HEAD_WIDTH),
        k=numbers(KEY_HEADS, length, HEAD_WIDTH),
    )


def collate(
    samples: Sequence[Sample],
    *,
    dtype: torch.dtype = torch.float32,
    left: bool = False,
    extra: int = 0,
    garbage: float = float("nan"),
    tower: Collection[str] = (*TOWER, "class_attention@1/3"),
) -> Tokens:
    """`Tokens` of a batch; text padded on the right or the `left`, `extra` more padding, `garbage` in all of it.

    `tower` names the signals of the vision tower that they have.
    """
    batch = len(samples)
    n = max(len(s.alive) for s in samples) + extra
    t = max(len(s.text) for s in samples) + extra
    hidden = torch.full((batch, n, WIDTH), garbage)
    text = torch.full((batch, t, WIDTH), garbage)
    q = torch.full((batch, HEADS, n + t, HEAD_WIDTH), garbage)
    k = torch.full((batch, KEY_HEADS, n + t, HEAD_WIDTH), garbage)
    origin = torch.full((batch, n), -1)
    places = torch.full((batch, t), -1)
    cell = torch.zeros(batch, n, 3, dtype=torch.int64)
    for i, s in enumerate(samples):
        size, texts = len(s.alive), len(s.text)
        start = t - texts if left else 0
        hidden[i, :size], text[i, start : start + texts] = s.hidden, s.text
        origin[i, :size] = torch.tensor(s.alive, dtype=torch.int64)
        places[i, start : start + texts] = torch.arange(n + start, n + start + texts)
        frames = [grid[1:] for grid in s.grids for _ in range(grid[0])]
        cells = [
            (frame, row, column)
            for frame, (height, width) in enumerate(frames)
            for row in range(height)
            for column in range(width)
        ]
        cell[i, :size] = torch.tensor([cells[j] for j in s.alive], dtype=torch.int64).view(-1, 3)
        for padded, x in ((q, s.q), (k, s.k)):
            padded[i, :, :size] = x[:, :size]
            padded[i, :, n + start : n + start + texts] = x[:, size:]
    valid = origin >= 0
    slot = torch.arange(n).expand(batch, n)
    # One layer has run: what it was entered by, and its keys.
    queries, keys = (x.transpose(1, 2).to(dtype) for x in (q, k))
    recorded = {"earlier_1": hidden.flip(-1).to(dtype), "layer_keys": keys[:, :n], "layer_queries": queries[:, :n]}
    rows = Question(
        text.to(dtype),
        places >= 0,
        padded=any(len(s.text) < t for s in samples),
        slot=places.clamp(min=0),
        states=text.flip(-1).to(dtype),
        keys=keys[:, n:],
    )
    made = Tokens(
        hidden=hidden.to(dtype),
        valid=valid,
        origin=origin,
        slot=slot.masked_fill(~valid, 0),
        cell=cell,
        position=slot,
        mass=valid.float(),
        question=rows,
        sizes=tuple(len(s.alive) for s in samples),
        total=tuple(s.total for s in samples),
        grids=tuple(s.grids for s in samples),
        attention=attention_of(q.to(dtype), k.to(dtype), valid, places),
        glimpse=partial(glimpse_of, k[:, :, :n].to(dtype), valid),
        signals=Signals({name: Signal(x, valid, origin.masked_fill(~valid, 10**6)) for name, x in recorded.items()}),
    )
    return with_tower(made, tower)


def with_tower(tokens: Tokens, names: Collection[str]) -> Tokens:
    """The same with these signals of the vision tower, another one for every block."""
    found = {}
    for name in names:
        signal, _, block = name.partition("@")
        turned = sum(map(ord, block)) % WIDTH
        keys = tokens.signals.recorded["layer_keys"]
        value = (keys.value if signal == "keys" else tokens.hidden).roll(1 + turned, -1)
        if signal.endswith("attention"):
            value = tokens.hidden[..., turned - len(signal) % 2].float().abs()
        found[name] = replace(keys, value=value)
    return replace(tokens, signals=tokens.signals.adding(found))


def attention_of(q: Tensor, k: Tensor, valid: Tensor, places: Tensor) -> RaterAttention:
    """Attention of a sequence of vision tokens, then text; without rotary embedding, q and k are turned about."""
    n = valid.shape[1]
    return attention_from_qk(
        q,
        k,
        vision=torch.where(valid, torch.arange(n), -1),
        text=places,
        valid=torch.cat([valid, places >= 0], dim=1),
        before_rope=(q.flip(-1), k),
    )


def glimpse_of(k: Tensor, valid: Tensor, vectors: Tensor) -> Tensor:
    """What a position behind the prompt looks at: its query is the sum of its vectors, for two heads a key head."""
    query = vectors.sum(0).repeat(2)[: 2 * HEAD_WIDTH].view(2, HEAD_WIDTH)
    logits = torch.einsum("qd,bknd->bkqn", query, k.float()).flatten(1, 2)
    return logits.masked_fill(~valid[:, None], -torch.inf).softmax(-1).nan_to_num()


@st.composite
def samples(draw: st.DrawFn, *, least: int = 0, whole: bool = False, texts: int = 0) -> Sample:
    """A sample with at least `least` vision and `texts` text tokens; `whole`: nothing dropped yet."""
    side = st.integers(1, 5)
    grid = st.tuples(st.integers(1, 2), side, side)
    grids = tuple(draw(st.lists(grid, min_size=1 if least else 0, max_size=2)))
    total = sum(prod(g) for g in grids)
    if total < least:
        grids = (*grids, (1, least, 1))
        total += least
    alive = range(total)
    if not whole and draw(st.booleans()):
        alive = sorted(draw(st.sets(st.sampled_from(range(total)), min_size=least))) if total else alive
    return sample(
        *grids,
        texts=draw(st.integers(texts, 5)),
        seed=draw(st.integers(0, 10_000)),
        alive=alive,
        ties=draw(st.booleans()),
    )


@st.composite
def batches(draw: st.DrawFn, *, least: int = 0, whole: bool = False, texts: int = 0) -> list[Sample]:
    """One to three samples of different sizes."""
    return draw(st.lists(samples(least=least, whole=whole, texts=texts), min_size=1, max_size=3))


@st.composite
def counts_for(draw: st.DrawFn, batch: Sequence[Sample]) -> tuple[int, ...]:
    """A count for each sample, 0 to all of its tokens."""
    return tuple(draw(st.integers(0, len(s.alive))) for s in batch)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
