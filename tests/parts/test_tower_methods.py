"""Methods that read the vision tower: what their recipes keep and merge is what plain Python of the papers does."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import plain_tower as plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.builder import build
from tokenprune.core.tokens import Tokens
from tokenprune.parts.samplers.passes import by_window
from tokenprune.parts.schedulers.outliers import OutliersScheduler
from tokenprune.recipe import load_recipe
from tokenprune.stage import StageResult

grids = st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)).filter(lambda g: g[0] * g[1] * g[2] > 1)
seeds = st.integers(0, 10_000)


def first_stage(
    name: str, grid: plain.Grid, seed: int, count: int, variant: str | None = None
) -> tuple[StageResult, dict[str, Any]]:
    """The first stage of a recipe on random tokens when it keeps `count`, and its input as plain arrays: x, signals."""
    stage = next(iter(build(load_recipe(name, variant=variant), depth=32)))
    n = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    signals = {each: signal(each, n, generator) for each in sorted(stage.reads.tower)}
    hidden = torch.randn(1, n, 16, generator=generator)
    result = stage(Tokens.from_hidden(hidden, grid=grid, signals=signals), count)
    result.tokens.check()
    arrays = {each: value[0].double().numpy() for each, value in signals.items()}
    return result, {"x": hidden[0].double().numpy(), **arrays}


def signal(name: str, n: int, generator: torch.Generator) -> Tensor:
    if name.partition("@")[0].endswith("attention"):
        return torch.rand(1, n, generator=generator).softmax(1)
    return torch.randn(1, n, *((4, 4) if name.startswith("keys") else (12,)), generator=generator)


def drawn_count(data: st.DataObject, grid: plain.Grid) -> int:
    """Any that drops something."""
    return data.draw(st.integers(1, grid[0] * grid[1] * grid[2] - 1))


def same_rows(result: StageResult, states: Mapping[int, np.ndarray]) -> None:
    """The tokens that are left, and their states."""
    assert result.tokens.origin[0].tolist() == list(states)
    expected = np.array(list(states.values()))
    assert np.abs(result.tokens.hidden[0].double().numpy() - expected).max() < 1e-4
    assert float(result.tokens.mass.sum()) == pytest.approx(int(result.tokens.total[0]), rel=1e-4)


@settings(max_examples=40)
@given(grids, seeds, st.sampled_from([None, "128", "192"]), st.data())
def test_visionzip(grid: plain.Grid, seed: int, variant: str | None, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("visionzip", grid, seed, count, variant)
    targets = int((result.merged >= 0).sum())
    states = plain.visionzip(seen["x"], seen["class_attention"], seen["keys"], count, targets)
    same_rows(result, states)


@settings(max_examples=40)
@given(grids, seeds, st.data())
def test_vispruner(grid: plain.Grid, seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("vispruner", grid, seed, count)
    kept = plain.vispruner(seen["class_attention"], seen["hidden"], count, Fraction(1, 2), 8)
    assert result.kept[0].tolist() == kept


@settings(max_examples=60)
@given(grids, seeds, st.sampled_from([None, "qwen"]), st.data())
def test_vscan(grid: plain.Grid, seed: int, variant: str | None, data: st.DataObject) -> None:
    """The kept set, and the plain mean of each survivor and all that join it."""
    count = drawn_count(data, grid)
    result, seen = first_stage("vscan", grid, seed, count, variant)
    if variant is None:
        local, overall, window = seen["class_attention@5/24"], seen["class_attention"], 6
    else:
        local, overall, window = seen["received_attention@7/32"], seen["received_attention"], 4
    kept = plain.vscan(local, overall, [grid], window, count, Fraction(1, 2), capped=variant == "qwen")
    same_rows(result, plain.merged_into_nearest(seen["x"], kept))


@pytest.mark.parametrize("seed", range(20))
def test_small_windows_that_cannot_give_their_share_leave_it_to_the_scores(seed: int) -> None:
    """Windows of 16, 4, 4 and 1 tokens have 10 of the 11 that they are due."""
    result, seen = first_stage("vscan", (1, 5, 5), seed, 22, "qwen")
    local, overall = seen["received_attention@7/32"], seen["received_attention"]
    assert result.kept[0].tolist() == plain.vscan(local, overall, [(1, 5, 5)], 4, 22, Fraction(1, 2), capped=True)


def test_on_llava_every_window_gives_its_share_however_little_it_is_looked_at() -> None:
    """Nine of four windows of 3 × 3, of which the first two have all the attention: two each, and one more."""
    tokens = strategies.collate([strategies.sample((1, 6, 6))], tower=())
    looked = torch.arange(36.0, 0, -1).unsqueeze(0)
    for even, shares in ((True, [3, 2, 2, 2]), (False, [3, 3, 3, 0])):
        taken = by_window(tokens, looked, [9], 3, even=even)[0]
        row, column = taken // 6 // 3, taken % 6 // 3
        assert torch.bincount(2 * row + column, minlength=4).tolist() == shares


@settings(max_examples=60)
@given(grids, seeds, st.sampled_from([None, "qwen"]), st.data())
def test_hiprune(grid: plain.Grid, seed: int, variant: str | None, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("hiprune", grid, seed, count, variant)
    middle = seen["received_attention@8/24" if variant is None else "received_attention@15/32"]
    kept = plain.hiprune(middle, seen["received_attention"], [grid], count, Fraction(1, 50))
    assert result.kept[0].tolist() == kept


@settings(max_examples=40)
@given(grids, seeds, st.sampled_from(["prumerge", "prumerge-plus"]), st.data())
def test_prumerge(grid: plain.Grid, seed: int, name: str, data: st.DataObject) -> None:
    """With a count: what is kept, what survivors become, and the token of the rest."""
    count = drawn_count(data, grid)
    result, seen = first_stage(name, grid, seed, count)
    attention, keys = seen["class_attention@-1"], seen["keys@-1"]
    share = Fraction(1) if name == "prumerge" else Fraction(1, 4)
    kept = plain.best_and_even(attention, count, share)
    same_rows(result, plain.prumerge(seen["x"], attention, keys, kept, 32))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), seeds, st.sampled_from([0.0, 0.5, 1.5]), st.integers(1, 4))
def test_outliers_are_those_of_numpys_quartiles(sizes: list[int], seed: int, factor: float, times: int) -> None:
    """Of ragged samples, heavy-tailed, each by itself."""
    generator = torch.Generator().manual_seed(seed)
    samples = [strategies.sample((1, 1, n), seed=seed + n) for n in sizes]
    tokens = strategies.collate(samples, extra=2)
    scores = tokens.only_valid(torch.randn(tokens.valid.shape, generator=generator).exp())
    counts = OutliersScheduler(factor=factor, times=times)(tokens, scores)
    for row, n in enumerate(sizes):
        found = plain.outliers(scores[row, :n].double().numpy(), factor)
        assert int(counts[row]) == min(n, max(1, times * found))
