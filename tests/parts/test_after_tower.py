"""Methods that choose by the tower's attention, held against plain Python of their formulas."""

from __future__ import annotations

from typing import Any

import plain_after_tower as plain
import plain_greedy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.test_tower_methods import drawn_count, first_stage, grids, seeds

from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.groupers.principal import PrincipalGrouper
from tokenprune.parts.groupers.stretch import StretchGrouper
from tokenprune.parts.samplers.greedy import SuppressSampler

examples = settings(max_examples=30)


@examples
@given(grids, seeds, st.data())
def test_scope(grid: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("scope", grid, seed, count)
    alike = plain_greedy.cosines(seen["hidden"], seen["hidden"])
    kept = plain_greedy.facility_location(alike, count, candidate=list(seen["class_attention"]))
    assert result.kept[0].tolist() == sorted(kept)


@examples
@given(grids, seeds, st.data())
def test_holov(grid: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    count = drawn_count(data, grid)
    result, seen = first_stage("holov", grid, seed, count)
    assert result.kept[0].tolist() == plain.holov(seen["x"], seen["class_attention"], count, 16, 0.09)


def test_a_stretch_of_more_variety_is_due_more() -> None:
    """Which the code's own formula does not do: it scales each stretch's variance to the stretch's own attention."""
    x = torch.ones(1, 8, 4)
    x[0, 4:6] *= -1  # the second stretch looks both ways
    tokens = Tokens.from_hidden(x, grid=(1, 8))
    scores = torch.ones(1, 8)
    plain_share = StretchGrouper(parts=2, by="score")
    varied = StretchGrouper(parts=2, by="score", diversity=1.0)
    assert plain_share.share(plain_share(tokens), (4,), scores) == ((2, 2),)
    assert varied.share(varied(tokens), (4,), scores) == ((1, 3),)


@examples
@given(grids, seeds, st.sampled_from([(None, 16, 2.0), ("128", 32, 4.0)]), st.data())
def test_prunesid(grid: tuple[int, int, int], seed: int, setting: tuple[str | None, int, float], data: Any) -> None:
    variant, components, factor = setting
    count = drawn_count(data, grid)
    result, seen = first_stage("prunesid", grid, seed, count, variant)
    expected = plain.prunesid(seen["hidden"], seen["class_attention"], count, components, factor)
    assert result.kept[0].tolist() == expected


@examples
@given(grids, seeds, st.sampled_from([0.5, 0.9, 1.5]), st.data())
def test_suppression_by_the_mean(grid: tuple[int, int, int], seed: int, factor: float, data: Any) -> None:
    """At thresholds that put tokens back, which the recipe's own hardly does; without groups."""
    n = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    tokens = Tokens.from_hidden(1 + torch.randn(1, n, 5, generator=generator), grid=grid)
    count, scores = data.draw(st.integers(1, n)), torch.rand(1, n, generator=generator)
    x = tokens.hidden[0].double().numpy()
    alike = plain_greedy.cosines(x, x)
    threshold = factor * float((alike.sum() - n) / (n * (n - 1)))
    kept = SuppressSampler(threshold=factor, relative=True)(tokens, scores, count)[0].tolist()
    assert kept == sorted(plain_greedy.suppress(scores[0].tolist(), alike, threshold, count))


def test_a_threshold_above_every_cosine_is_a_mistake() -> None:
    with pytest.raises(InputError, match="no cosine is above 1"):
        SuppressSampler(threshold=2.0)


def test_tokens_of_one_pattern_are_one_group() -> None:
    """Three things on a picture, each in channels of its own, unequally often; and equal tokens are never parted."""
    things = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) * 3
    of = torch.tensor([0] * 9 + [1] * 6 + [2] * 3)
    x = things[of][None] + 0.01 * torch.randn(1, 18, 12, generator=torch.Generator().manual_seed(1))
    groups = PrincipalGrouper(components=3, features="hidden")(Tokens.from_hidden(x, grid=(3, 6)))
    assert len({*zip(of.tolist(), groups.index[0].tolist(), strict=True)}) == len({*groups.index[0].tolist()}) == 3
    same = PrincipalGrouper(features="hidden")(Tokens.from_hidden(torch.ones(2, 6, 4), grid=(2, 3)))
    assert same.sizes == ((6,), (6,))
