"""Budgets: the rounding rule, the solver against brute force, published schedules, and the wording of refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenprune.budget import (
    Budget,
    BudgetKind,
    Step,
    check_share,
    count_of,
    nominal_counts,
    plan,
    summary,
    survivors,
    tokens_per_layer,
)
from tokenprune.errors import BudgetError

GRIDS = [(1, 24, 24)]


@dataclass(frozen=True)
class Fixed:
    """Keeps a share of the original tokens, or a count."""

    keep: float
    static: bool = True

    def nominal(self, size: int, *, total: int, grids: Sequence[tuple[int, int, int]]) -> float:
        return self.count(size, total=total, grids=grids)

    def count(self, size: int, *, total: int, grids: Sequence[tuple[int, int, int]]) -> int:
        return min(count_of(self.keep, total), size)


@dataclass(frozen=True)
class Share:
    """Keeps a share of what enters, as a real number."""

    keep: float
    static: bool = False

    def nominal(self, size: int, *, total: int, grids: Sequence[tuple[int, int, int]]) -> float:
        return self.keep * size


class Drop:
    def added(self, dropped: int) -> int:
        return 0


class Pairs:
    """Two dropped tokens make a merged one."""

    def added(self, dropped: int) -> int:
        return (dropped + 1) // 2


class Cluster:
    """SparseVLM's counts: R = int(0.3 P) + 1, C = int(R / 10) + 1."""

    def added(self, dropped: int) -> int:
        return 0 if dropped == 0 else int((3 * dropped // 10 + 1) / 10) + 1


def steps(layers: Sequence[int], keeps: Sequence[float], recycler: object) -> list[Step]:
    return [Step(layer, Fixed(keep), recycler) for layer, keep in zip(layers, keeps, strict=True)]


# ------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("keep", "of", "count"),
    [
        (1 - 0.9, 10, 1),  # int(10 * (1 - 0.9)) is 0
        (1 - 0.9, 100, 10),
        (1 - 0.9, 1000, 100),
        (1 - 0.778, 576, 127),  # a floor: 127.87
        (0.3, 729, 218),
        (0.25, 729, 182),
        (0.09, 275, 24),
        (1 / 3, 576, 192),
        (0.29, 100, 29),  # 28.999999999999996
        (0.1 + 0.2, 10, 3),
        (0.9999999, 576, 575),
        (1.0, 576, 576),
        (1e-12, 576, 1),
        (0.5, 1, 1),
        (0.5, 0, 0),
        (1.0, 0, 0),
        (64, 576, 64),
        (1, 576, 1),
        (1000, 576, 576),
        (5, 0, 0),
    ],
)
def test_count_of(keep: float, of: int, count: int) -> None:
    assert count_of(keep, of) == count


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_count_of_is_exact_for_decimal_shares(millionths: int, of: int) -> None:
    keep = millionths / 10**6
    expected = min(of, max(1, millionths * of // 10**6))
    assert count_of(keep, of) == expected
    assert count_of(1 - (1 - keep), of) == expected  # 1 - keep, as users write it, rounds to another float


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.0001, 64.0, math.nan, math.inf, True, False, "0.5", None])
def test_count_of_refuses(keep: object) -> None:
    with pytest.raises(BudgetError, match="keep"):
        count_of(keep, 576)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="budget"):
        Budget("keep", keep)  # type: ignore[arg-type]


def test_a_share_above_one_says_how_to_write_a_count() -> None:
    with pytest.raises(BudgetError, match=r"got 64\.0 \(write a count without a decimal point\)"):
        count_of(64.0, 576)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(
        BudgetError, match=r"one of keep, average, final, flops, got 'averge' \(did you mean 'average'\?\)"
    ):
        Budget("averge", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "value"), [("average", 0.83), ("final", 0.59)])
def test_a_share_that_rounds_below_a_whole_number_means_that_number(kind: BudgetKind, value: float) -> None:
    """0.58 * 100 is 57.99999999999999, yet the recycler makes tokens of 42 dropped ones, as behind a count of 58."""
    assert 0.58 * 100 < 58
    plans = [
        plan(
            [Step(2, first, Pairs()), Step(8, Share(0.38), Pairs())],
            Budget(kind, value),
            depth=16,
            total=100,
            grids=[(1, 10, 10)],
        )
        for first in (Share(0.58), Fixed(58))
    ]
    assert plans[0] == plans[1]


# --------------------------------------------------------------------------------------------- published schedules


@pytest.mark.parametrize(
    ("keeps", "after", "outputs", "inputs"),
    [
        ((300, 200, 110), (309, 204, 113), 192.03125, 206.5),
        ((303, 110, 36), (312, 117, 39), 128.625, 145.40625),
        ((238, 48, 26), (249, 55, 27), 96.9375, 114.09375),
        ((66, 30, 17), (82, 32, 18), 64.8125, 82.25),
    ],
)
def test_sparsevlm_tables(keeps: tuple[int, ...], after: tuple[int, ...], outputs: float, inputs: float) -> None:
    """specs/sparsevlm.md section 3: tokens after each stage, and both averages."""
    stages = steps((3, 7, 16), keeps, Cluster())
    assert plan(stages, None, depth=32, total=576, grids=GRIDS) == keeps
    assert survivors(stages, keeps, 576) == after
    told = summary(stages, keeps, 32, 576)
    assert (told.average_of_outputs, told.average, told.final) == (outputs, inputs, after[-1])
    assert tokens_per_layer(stages, keeps, 32, 576) == [576] * 3 + [after[0]] * 4 + [after[1]] * 9 + [after[2]] * 16
    # The published counts are their own shape, so the average that they have leads back to them.
    lands = plan(stages, Budget("average", math.ceil(inputs)), depth=32, total=576, grids=GRIDS)
    assert survivors(stages, lands, 576) == pytest.approx(after, rel=0.05, abs=1)  # up to a token of the average more


@pytest.mark.parametrize(
    ("keeps", "outputs", "inputs"),
    [
        ((300, 200, 118), 192.44, 206.75),
        ((238, 108, 60), 128.00, 144.13),
        ((246, 54, 28), 96.81, 113.94),
        ((66, 34, 20), 64.44, 81.81),
    ],
)
def test_sparsevlm_plus_tables(keeps: tuple[int, ...], outputs: float, inputs: float) -> None:
    told = summary(steps((3, 7, 16), keeps, Drop()), keeps, 32, 576)
    assert told.average_of_outputs == pytest.approx(outputs, abs=0.0051)
    assert told.average == pytest.approx(inputs, abs=0.0051)


def test_pyramiddrop_average_and_back() -> None:
    stages = [Step(layer, Share(0.5), Drop()) for layer in (8, 16, 24)]
    counts = nominal_counts(stages, total=576, grids=GRIDS)
    assert counts == (288, 144, 72)
    assert summary(stages, counts, 32, 576).average == 270
    assert plan(stages, Budget("average", 270), depth=32, total=576, grids=GRIDS) == (288, 144, 72)
    assert plan(stages, Budget("average", 0.46875), depth=32, total=576, grids=GRIDS) == (288, 144, 72)
    assert plan(stages, Budget("keep", 168), depth=32, total=576, grids=GRIDS) == (288, 144, 72)
    assert plan(stages, Budget("final", 72), depth=32, total=576, grids=GRIDS) == (288, 144, 72)


def test_vscan_average_and_back() -> None:
    """96 tokens after vision, 32 from layer 16 of 32 on, average 64: specs/training_free.md section 4.3."""
    stages = steps((0, 16), (96, 32), Drop())
    assert summary(stages, (96, 32), 32, 576).average == 64
    for total in (576, 2880):
        assert plan(stages, Budget("average", 64), depth=32, total=total, grids=GRIDS) == (96, 32)
    assert plan(stages, Budget("average", 128), depth=32, total=576, grids=GRIDS) == (192, 64)


def test_stages_that_step_up_together_share_what_is_left() -> None:
    """From (101, 50) both stages would step up at once, to 76.5 tokens a layer; there is room for the first."""
    stages = steps((0, 16), (100, 50), Drop())
    assert plan(stages, Budget("average", 76), depth=32, total=576, grids=GRIDS) == (102, 50)


def test_one_stage_keeps_exactly_the_budget() -> None:
    for recycler in (Drop(), Cluster()):
        stages = steps((2,), (0.5,), recycler)
        for kind in ("keep", "final"):
            (count,) = plan(stages, Budget(kind, 64), depth=32, total=576, grids=GRIDS)
            assert survivors(stages, (count,), 576) == (64,)
        (count,) = plan(stages, Budget("keep", 1 / 3), depth=32, total=576, grids=GRIDS)
        assert survivors(stages, (count,), 576) == (192,)


def test_summary_tells_every_meaning_together() -> None:
    told = str(summary(steps((2,), (0.5,), Drop()), (288,), 32, 576))
    assert told == (
        "of 576 vision tokens, 306.00 enter a layer on average (leave it: 297.00), "
        "288.00 from the first place on, 288 in the end"
    )


# ---------------------------------------------------------------------------------------------- without a budget


def test_static_schedulers_are_chained_and_adaptive_ones_left_open() -> None:
    stages = [Step(3, Fixed(0.5), Drop()), Step(7, Share(0.5), Drop()), Step(9, Fixed(0.1), Drop())]
    assert plan(stages, None, depth=32, total=576, grids=GRIDS) == (288, None, None)
    assert plan(stages, Budget("keep", 0.3), depth=32, total=576, grids=GRIDS)[2] is not None
    assert nominal_counts(stages, total=576, grids=GRIDS) == (288, 144, 57)


def test_no_vision_tokens_and_no_stages() -> None:
    stages = steps((3, 7), (0.5, 0.25), Cluster())
    for budget in (None, Budget("keep", 64), Budget("average", 0.3)):
        assert plan(stages, budget, depth=32, total=0, grids=[]) == (0, 0)
    assert survivors(stages, (0, 0), 0) == (0, 0)
    assert tokens_per_layer(stages, (0, 0), 8, 0) == [0] * 8
    assert plan([], None, depth=32, total=576, grids=GRIDS) == ()
    assert plan([], Budget("keep", 1.0), depth=32, total=576, grids=GRIDS) == ()
    assert summary([], (), 32, 576).average == 576
    with pytest.raises(BudgetError, match=r"keep: 64: this recipe has no stages, so it keeps all 576"):
        plan([], Budget("keep", 64), depth=32, total=576, grids=GRIDS)


# ----------------------------------------------------------------------------------------------------- properties


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Step], int, int]:
    """Stages, depth and vision tokens: any depth, any number of tokens, shares and counts, with and without merging."""
    depth = draw(st.integers(2, 80))
    count = draw(st.integers(1, 4))
    layers = sorted(draw(st.lists(st.integers(0, depth - 1), min_size=count, max_size=count)))
    total = draw(st.integers(1, 3000))
    keep = st.one_of(st.floats(0.001, 1.0), st.integers(1, 700))
    scheduler = st.one_of(keep.map(Fixed), st.floats(0.001, 1.0).map(Share))
    recycler = st.sampled_from([Drop(), Cluster()])
    return [Step(layer, draw(scheduler), draw(recycler)) for layer in layers], depth, total


kinds = st.sampled_from(["keep", "average", "final"])


def quantity(stages: Sequence[Step], counts: Sequence[int | None], kind: str, depth: int, total: int) -> float:
    told = summary(stages, [count for count in counts if count is not None], depth, total)
    return float(getattr(told, kind))


def solve(stages: Sequence[Step], budget: Budget, depth: int, total: int) -> tuple[int, ...] | None:
    """The plan, checked for what every plan must be; None when refused."""
    try:
        counts = plan(stages, budget, depth=depth, total=total, grids=[(1, 1, total)])
    except BudgetError:
        return None
    known = tuple(count for count in counts if count is not None)
    assert len(known) == len(stages)
    sizes = (total, *survivors(stages, known, total))
    assert all(1 <= count <= size for count, size in zip(known, sizes, strict=False))
    assert list(sizes) == sorted(sizes, reverse=True)
    entering = tokens_per_layer(stages, known, depth, total)
    assert len(entering) == depth
    assert entering == sorted(entering, reverse=True)
    assert set(entering) <= set(sizes)
    return known


@given(problems(), kinds, st.integers(1, 3000))
def test_a_count_is_met_to_one_token_and_never_exceeded(
    problem: tuple[list[Step], int, int], kind: str, value: int
) -> None:
    stages, depth, total = problem
    counts = solve(stages, Budget(kind, value), depth, total)  # type: ignore[arg-type]
    assume(counts is not None)
    target = min(value, total)
    assert target - 1 < quantity(stages, counts or (), kind, depth, total) <= target + 1e-9


@given(problems(), kinds, st.floats(0.001, 1.0))
def test_a_share_is_met_to_one_token_or_at_the_minimum(
    problem: tuple[list[Step], int, int], kind: str, value: float
) -> None:
    stages, depth, total = problem
    counts = solve(stages, Budget(kind, value), depth, total)  # type: ignore[arg-type]
    assume(counts is not None)
    target, got = count_of(value, total), quantity(stages, counts or (), kind, depth, total)
    if got > target + 1e-9:  # fewer tokens than a share needs: as few as the stages can
        assert all(count == 1 for count in counts or ())
    else:
        assert target - 1 < got


@given(problems(), kinds, st.integers(1, 3000), st.integers(0, 50))
def test_a_larger_budget_never_keeps_less_anywhere(
    problem: tuple[list[Step], int, int], kind: str, value: int, more: int
) -> None:
    stages, depth, total = problem
    small = solve(stages, Budget(kind, value), depth, total)  # type: ignore[arg-type]
    large = solve(stages, Budget(kind, value + more), depth, total)  # type: ignore[arg-type]
    assume(small is not None)
    assert large is not None
    for less, many in zip(survivors(stages, small or (), total), survivors(stages, large, total), strict=True):
        assert less <= many


@given(problems(), kinds, st.sampled_from([1.0, 3000]))
def test_a_full_budget_is_the_identity(problem: tuple[list[Step], int, int], kind: str, value: float) -> None:
    stages, depth, total = problem
    assert solve(stages, Budget(kind, value), depth, total) == (total,) * len(stages)  # type: ignore[arg-type]


@given(problems(), kinds, st.integers(1, 3000))
def test_a_refusal_names_a_budget_that_works(problem: tuple[list[Step], int, int], kind: str, value: int) -> None:
    stages, depth, total = problem
    for asked in (value, value / 3000):
        budget = Budget(kind, asked)  # type: ignore[arg-type]
        if solve(stages, budget, depth, total) is None:
            with pytest.raises(BudgetError, match="nearest valid budget") as refusal:
                plan(stages, budget, depth=depth, total=total, grids=GRIDS)
            nearest = str(refusal.value).rsplit(": ", 1)[1]
            valid = Budget(kind, float(nearest) if "." in nearest else int(nearest))  # type: ignore[arg-type]
            assert valid.is_share == isinstance(asked, float)
            assert valid.value > asked
            assert solve(stages, valid, depth, total) is not None


@given(problems(), st.floats(0.01, 1.0))
def test_the_shape_is_kept_where_nothing_is_clamped(problem: tuple[list[Step], int, int], value: float) -> None:
    """Scaled to the cost of its own nominal counts, a recipe keeps them to a token."""
    stages, depth, total = problem
    stages = [Step(step.layer, step.scheduler, Drop()) for step in stages]
    own = nominal_counts(stages, total=total, grids=GRIDS)
    cost = Fraction(sum(tokens_per_layer(stages, own, depth, total)), depth)
    assume(cost.denominator == 1)
    counts = plan(stages, Budget("average", int(cost)), depth=depth, total=total, grids=GRIDS)
    assert quantity(stages, counts, "average", depth, total) > cost - 1


# --------------------------------------------------------------------------------------------------------- errors


def test_an_average_below_the_untouched_layers_is_refused() -> None:
    stages = steps((8, 16, 24), (0.5, 0.25, 0.125), Drop())
    message = (
        r"budget average: 64: stages that act before layers 8, 16, 24 of 32 can reach 144\.75 … 576 of 576 "
        r"vision tokens; the nearest valid budget is average: 145"
    )
    with pytest.raises(BudgetError, match=message):
        plan(stages, Budget("average", 64), depth=32, total=576, grids=GRIDS)
    assert plan(stages, Budget("average", 145), depth=32, total=576, grids=GRIDS)


def test_a_share_that_no_picture_can_meet_is_refused_with_shares_and_without_a_picture() -> None:
    stages = steps((8, 16, 24), (0.5, 0.25, 0.125), Drop())
    message = (
        r"budget average: 0\.1: stages that act before layers 8, 16, 24 of 32 can reach 0\.25 … 1\.0; "
        r"the nearest valid budget is average: 0\.251"
    )
    with pytest.raises(BudgetError, match=message):
        plan(stages, Budget("average", 0.1), depth=32, total=576, grids=GRIDS)
    with pytest.raises(BudgetError, match=message):
        check_share(stages, Budget("average", 0.1), depth=32)
    for budget in (None, Budget("average", 0.251), Budget("average", 1), Budget("keep", 0.001)):
        check_share(stages, budget, depth=32)
    check_share([], Budget("keep", 0.1), depth=32)


def test_a_share_that_only_a_tiny_image_cannot_meet_is_met_as_nearly_as_it_can() -> None:
    """Whether a share is valid depends on the recipe and the model, never on the size of one image."""
    stages = steps((3,), (0.5,), Drop())
    assert plan(stages, Budget("average", 0.3), depth=32, total=3, grids=GRIDS) == (1,)
    with pytest.raises(BudgetError):
        plan(stages, Budget("average", 0.09), depth=32, total=3, grids=GRIDS)


def test_stages_must_be_in_order_and_within_the_model() -> None:
    with pytest.raises(BudgetError, match=r"in a model of 8 layers these stages act before layers \[3, 2\]"):
        plan(steps((3, 2), (0.5, 0.25), Drop()), None, depth=8, total=576, grids=GRIDS)
    with pytest.raises(BudgetError, match=r"before layers \[16\] do not fit a model of 8 layers"):
        plan(steps((16,), (0.5,), Drop()), None, depth=8, total=576, grids=GRIDS)
    with pytest.raises(BudgetError, match="cannot keep 300 of 288 vision tokens"):
        survivors(steps((3, 7), (0.5, 0.25), Drop()), (288, 300), 576)
