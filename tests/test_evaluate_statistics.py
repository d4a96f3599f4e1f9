"""Statistics of `tokenprune.study.evaluate`, against closed forms."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import InputError
from tokenprune.study.evaluate import (
    Estimate,
    accuracy,
    difference,
    holm,
    sign_flip,
    wilson,
)
from tokenprune.study.statistics import resampled_means


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (7, 20), (90, 100)])
def test_wilson_ends_solve_the_score_equation(right: int, n: int) -> None:
    """Its ends are the shares p from which the observed share lies exactly z standard errors of p away."""
    z = 1.7
    low, high = wilson(right, n, z=z)
    for end in (low, high):
        assert (right / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low <= right / n <= high <= 1 and low < high


def test_wilson_known_value_and_refusals() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    for right, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError, match="wilson: expected 0 to n successes"):
            wilson(right, n)


def test_bootstrap_of_single_questions_has_the_binomial_error() -> None:
    scores = (np.arange(400) % 10 < 7).astype(float)
    means = resampled_means(scores, range(400), draws=20_000)
    assert means.mean() == pytest.approx(0.7, abs=1e-3)
    assert means.std() == pytest.approx(math.sqrt(0.7 * 0.3 / 400), rel=0.03)


def test_bootstrap_keeps_the_questions_of_a_picture_together() -> None:
    """Five copies of each answer say no more than one: the error stays that of the pictures."""
    once = (np.arange(200) % 2).astype(float)
    means = resampled_means(np.repeat(once, 5), np.repeat(np.arange(200), 5).tolist(), draws=20_000)
    assert means.std() == pytest.approx(math.sqrt(0.25 / 200), rel=0.03)


def test_paired_difference_is_narrower_where_arms_agree() -> None:
    """Per-question differences are +1, -1 and 0 with shares b, c and the rest: variance (b + c - (b - c)²) / n."""
    first = np.concatenate([np.ones(500), np.zeros(500)])
    second = first.copy()
    second[:60], second[500:520] = 0, 1
    found = difference(second, first, list(range(1000)))
    assert found.value == pytest.approx(-0.04)
    error = math.sqrt((0.08 - 0.04**2) / 1000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.08)
    assert found == difference(second, first, list(range(1000)))


def test_identical_arms_differ_by_exactly_nothing() -> None:
    scores = (np.arange(30) % 3 == 0).astype(float)
    assert difference(scores, scores, [i // 3 for i in range(30)]) == Estimate(0.0, 0.0, 0.0)


def test_accuracy_takes_wilson_where_questions_are_independent() -> None:
    scores = np.array([1.0] * 18 + [0.0] * 2)
    assert accuracy(scores, list(range(20))).ends == wilson(18, 20)
    assert accuracy(np.ones(20), [i // 4 for i in range(20)]).ends == wilson(5, 5)  # nothing to resample
    clustered = accuracy(scores, [i // 4 for i in range(20)])
    assert clustered.value == 0.9 and clustered.low < 0.9 < clustered.high
    with pytest.raises(InputError, match="got 2 for 3"):
        accuracy(np.ones(3), [1, 2])


def test_sign_flips_of_few_pictures_are_all_tried() -> None:
    """Against a count by hand and by a plain loop: of 2^m patterns, those whose sum is as far from 0."""
    one = np.ones(5)
    assert sign_flip(one, 0 * one, range(5)) == 2 / 32  # only all plus and all minus
    assert sign_flip(one, one, range(5)) == 1
    assert sign_flip(np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 0, 1]), range(4)) == 10 / 16  # 1 + 4 patterns a side
    gaps = np.array([0.4, -0.2, 1, 0.6, 0, 0.2])
    patterns = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in product((1, -1), repeat=6)]
    assert sign_flip(gaps, 0 * gaps, range(6)) == sum(p >= 2 - 1e-9 for p in patterns) / 64


def test_sign_flips_move_whole_pictures() -> None:
    """Ten questions about one picture are one coin: no difference in it alone can be below 1."""
    assert sign_flip(np.ones(10), np.zeros(10), [0] * 10) == 1
    assert sign_flip(np.ones(10), np.zeros(10), [i // 2 for i in range(10)]) == 2 / 32


def test_sign_flips_of_many_pictures_follow_the_binomial() -> None:
    """Wins against losses, one a picture: twice the tail of a fair coin (the sign test)."""
    gaps = np.array([1.0] * 60 + [-1.0] * 40 + [0.0] * 50)
    tail = 2 * sum(math.comb(100, k) for k in range(60, 101)) / 2**100
    found = sign_flip(gaps, np.zeros(150), range(150))
    assert found == pytest.approx(tail, abs=4 * math.sqrt(tail / 10_000))
    assert found == sign_flip(gaps, np.zeros(150), range(150))
    assert sign_flip(-gaps, np.zeros(150), range(150)) == found
    assert sign_flip(np.ones(100), np.zeros(100), range(100)) == 1 / 10_000  # never 0: what was seen is one of them


def test_sign_flips_err_no_more_often_than_they_say() -> None:
    """Every outcome of six equal coins, as likely as any other: p is at most alpha in at most alpha of them."""
    every = [sign_flip(np.array(s, float), np.zeros(6), range(6)) for s in product((1, -1), repeat=6)]
    for alpha in (1 / 32, 0.05, 0.25, 0.5):
        assert np.mean([p <= alpha + 1e-12 for p in every]) <= alpha
    assert min(every) == 2 / 64


def test_holm_by_hand() -> None:
    """0.01 · 4, 0.02 · 3, 0.03 · 2 = 0.06, and the largest is no smaller than the one before."""
    assert holm([0.03, 0.01, 0.045, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.2]) == [0.2] and holm([]) == []
    with pytest.raises(InputError, match=r"holm: expected p-values in \[0, 1\]"):
        holm([0.5, 1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_rejects_what_its_steps_reject(p_values: list[float], alpha: float) -> None:
    """Step by step: reject the smallest as long as it is at most alpha over the number of those left."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected: set[int] = set()
    for left, index in zip(range(len(order), 0, -1), order, strict=True):
        if left * p_values[index] > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected
