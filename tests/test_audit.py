"""Position bias against kept sets whose answers are known, and the pictures drawn of it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune as tp
from tokenprune.core.attention import attention_from_qk
from tokenprune.core.clock import Stopwatch
from tokenprune.core.grids import Tiles
from tokenprune.core.report import Report
from tokenprune.core.stage_report import StageReport
from tokenprune.errors import InputError
from tokenprune.families.chat import Chat
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.plot.audit import plot_audit
from tokenprune.plot.style import save
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import localisation_cases, scene_cases
from tokenprune.study.audit import THIRDS, Audit, StageAudit, audit_cases, proportion, rank_correlation
from tokenprune.study.audit.collect import third_of
from tokenprune.study.audit.heads import HeadAudit

GRID = (1, 8, 8)


def report(
    rows: list[list[int]],
    grids: Any = GRID,
    merged: list[list[int]] | None = None,
    stages: int = 1,
    scores: list[tuple[list[float], list[int]]] | None = None,
) -> Report:
    """A finished report of a batch whose stages all kept `rows`."""

    def padded(lists: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, lists))
        return torch.tensor([each + [-1] * (longest - len(each)) for each in lists], dtype=torch.int64)

    merged = merged or [[] for _ in rows]
    each = tuple((grids,) if isinstance(grids[0], int) else tuple(grids) for _ in rows)
    made = Report("synthetic", "0", 4, stages)
    made.begin(tuple(sum(t * h * w for t, h, w in grid) for grid in each), each)
    ran = []
    for number in range(stages):
        sizes = tuple(map(len, rows))
        nothing = torch.zeros(len(rows), 0, dtype=torch.int64)
        scored = None if scores is None else torch.tensor([numbers for numbers, _ in scores])
        places = nothing if scores is None else torch.tensor([index for _, index in scores])
        place = f"before layer {number}"
        left = padded([sorted(own + anchors) for own, anchors in zip(rows, merged, strict=True)])
        ran.append(
            StageReport(f"s{number}", place, number, left, padded(merged), sizes, scored, places, Stopwatch(False))
        )
    made.finish(ran)
    return made


def audited(*rows: list[int], grids: Any = GRID, boxes: Any = None, **more: Any) -> StageAudit:
    audit = Audit()
    audit.add(report(list(rows), grids, **more), boxes)
    return audit.stages[0]


BOTTOM, TOP, LATTICE = list(range(48, 64)), list(range(16)), [8 * y + x for y in range(0, 8, 2) for x in range(0, 8, 2)]


def test_bottom_rows_have_index_1_and_top_rows_minus_1() -> None:
    bottom, top = audited(BOTTOM), audited(TOP)
    assert bottom.rows.mean is not None and bottom.rows.mean.value == pytest.approx(0.875)
    assert bottom.rows.bias is not None and bottom.rows.bias.value == pytest.approx(1)
    assert top.rows.bias is not None and top.rows.bias.value == pytest.approx(-1)
    assert bottom.rows.thirds == pytest.approx((0, 0, 1))
    for stage in (bottom, top):
        assert stage.columns.bias is not None and stage.columns.bias.value == pytest.approx(0)
        assert stage.columns.cramers_v == 0
        assert stage.columns.thirds == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_columns_are_measured_like_rows() -> None:
    right = audited([8 * y + x for y in range(8) for x in (6, 7)])
    assert right.columns.bias is not None and right.columns.bias.value == pytest.approx(1)
    assert right.columns.profile == (0, 0, 0, 0, 0, 0, 1, 1)
    assert right.rows.bias is not None and right.rows.bias.value == pytest.approx(0)


def test_even_lattice_is_half_a_cell_from_0() -> None:
    """Origin (0, 0) and stride 2 leave the last row out: the mean is half a cell above the middle."""
    stage = audited(LATTICE)
    assert stage.rows.mean is not None and stage.rows.mean.value == pytest.approx(0.5 - 0.5 / 8)
    assert stage.rows.bias is not None and stage.rows.bias.value == pytest.approx(-0.0625 / 0.375)


def test_feathers_number() -> None:
    """Mean height 80.7 % at R = .75 is a bias index of .82 (FEATHER, section 3): here ten pictures of eleven."""
    stage = audited(*[BOTTOM] * 10, TOP)
    assert stage.rows.mean is not None and stage.rows.mean.value == pytest.approx(0.807, abs=5e-4)
    assert stage.rows.bias is not None and stage.rows.bias.value == pytest.approx(0.82, abs=5e-3)


def test_heat_map_counts_pictures() -> None:
    stage = audited([0, 9], [0, 63], [0], [7])
    expected = np.zeros((8, 8))
    expected[0, 0], expected[1, 1], expected[7, 7], expected[0, 7] = 3 / 4, 1 / 4, 1 / 4, 1 / 4
    np.testing.assert_array_equal(stage.heat, expected)
    assert (stage.pictures, stage.tokens, stage.kept, stage.keep) == (4, 64, 1.5, 6 / 256)
    assert stage.rows.profile == pytest.approx(expected.mean(1))


def test_batches_of_any_size_add_up() -> None:
    one, many = Audit(), audited(BOTTOM, TOP, LATTICE)
    for rows in (BOTTOM, TOP, LATTICE):
        one.add(report([rows]))
    assert one.pictures == 3
    assert one.stages[0].to_dict() == many.to_dict()


def test_anchors_of_merged_tokens_count_by_themselves() -> None:
    stage = audited([0, 1], [2], merged=[[62, 63], []])
    assert (stage.kept, stage.merged, stage.heat.sum()) == (1.5, 1, 1.5)
    assert (stage.heat_merged[7, 6:] == 0.5).all() and stage.heat_merged.sum() == 1
    assert stage.rows.mean is not None and stage.rows.mean.value == pytest.approx(0.5 / 8)


def test_cramers_v() -> None:
    assert audited(list(range(64))).rows.cramers_v == 0
    one_row = audited(list(range(8))).rows
    assert (one_row.cramers_v, one_row.cramers_v_most, one_row.degrees) == pytest.approx((1, 1, 7))
    assert one_row.chi_square == pytest.approx(8 * 7)
    two_rows = audited(TOP).rows
    assert two_rows.chi_square == pytest.approx(2 * 36 / 2 + 6 * 2)  # 8, 8, 0 ... against 2 each
    assert two_rows.cramers_v == pytest.approx((48 / 16 / 7) ** 0.5) == pytest.approx(two_rows.cramers_v_most)
    # Ten times the pictures: ten times the chi-square, the same V.
    tenfold = audited(*[TOP] * 10).rows
    assert (tenfold.chi_square, tenfold.cramers_v) == pytest.approx((480, two_rows.cramers_v))
    row_and_half = audited(list(range(12))).rows
    assert row_and_half.cramers_v == pytest.approx(row_and_half.cramers_v_most)
    assert audited(LATTICE).rows.cramers_v < two_rows.cramers_v_most


def test_recall_of_the_cells_that_overlap_the_target() -> None:
    top = (0.0, 0.0, 0.25, 0.126)  # two cells of the first row and, just, two of the second
    low = (0.5, 0.75, 0.75, 1.0)  # four cells: 52, 53, 60, 61
    stage = audited([0, 1, 8, 63], [52, 63], [0, 1], boxes=[top, low, None])
    found = {name: (each.share and each.share.value, each.targets) for name, each in stage.recall.items()}
    assert found == {"all": (0.5, 2), "top": (0.75, 1), "middle": (None, 0), "bottom": (0.25, 1)}
    assert audited([0]).recall == {}
    alike = audited(*[[0, 1]] * 8, boxes=[top] * 8).recall["top"].share
    assert alike is not None and (alike.value, alike.low, alike.high) == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_cover_the_truth_and_ask_for_enough_pictures() -> None:
    rng = np.random.default_rng(1)
    rows = [sorted(rng.choice(64, 16, replace=False).tolist()) for _ in range(200)]
    bias = audited(*rows).rows.bias
    assert bias is not None and bias.low is not None and bias.high is not None
    assert bias.low < bias.value < bias.high and bias.low < 0 < bias.high
    # Standard error of the mean height: sqrt(1/12 · 48/63 / 16) of one picture, over sqrt(200), in units of .375.
    error = (63 / 64 / 12 * 48 / 63 / 16 / 200) ** 0.5 / 0.375
    assert (bias.high - bias.low) / (2 * 1.96) == pytest.approx(error, rel=0.15)
    assert not bias.above(0) and not bias.below(0) and bias.above(-1) and bias.below(1)
    few = audited(*rows[:7]).rows.bias
    assert few is not None and few.low is None and not few.above(-9)


def test_wilson_interval() -> None:
    """Against the worked example of Wilson's interval for 8 of 10."""
    estimate = proportion(8, 10)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert proportion(0, 5).low == 0 and proportion(5, 5).high == 1


def test_nothing_or_everything_kept_has_no_bias() -> None:
    nothing, everything = audited([], []), audited(list(range(64)))
    assert nothing.rows.mean is None and nothing.rows.bias is None and nothing.rows.thirds == (0, 0, 0)
    assert everything.rows.bias is None and everything.rows.mean is not None and everything.rows.mean.value == 0.5
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_pictures_of_different_grids_share_a_heat_map() -> None:
    audit = Audit()
    audit.add(report([list(range(8, 16))], (1, 4, 4)))  # bottom half
    audit.add(report([list(range(18, 36))], (1, 6, 6)))
    audit.add(report([list(range(32, 64))]))
    (stage,) = audit.stages
    assert stage.heat.shape == (6, 6)
    assert stage.heat.sum() / 36 == pytest.approx(stage.keep) == pytest.approx(0.5)
    np.testing.assert_allclose(stage.heat, [[0.0] * 6] * 3 + [[1.0] * 6] * 3, atol=1e-12)
    assert stage.rows.bias is not None and stage.rows.bias.value == pytest.approx(1)


def test_tiles_and_overview_are_one_picture() -> None:
    """LLaVA-NeXT: 2 × 2 overview and 2 × 3 tiles with a newline token (index 6 + 1, 7 + 4) at each row's end."""
    stage = audited([2, 3, 7, 11], grids=[(1, 2, 2), Tiles(1, 2, 4)], boxes=[(0.0, 0.6, 1.0, 1.0)])
    assert (stage.tokens, stage.kept) == (10, 2)
    share_ = stage.recall["all"].share
    assert share_ is not None and share_.value == 2 / 5


@pytest.mark.parametrize(
    ("grids", "boxes", "message"),
    [
        ([(2, 4, 4)], None, r"sample 0 has the grids \[\(2, 4, 4\)\]; expected one picture a sample"),
        ([(1, 4, 4)] * 3, None, "expected one picture a sample"),
        (GRID, [None, None], "2 targets for 1 samples"),
        (GRID, [(0.5, 0.1, 0.5, 0.3)], "as shares of the picture"),
        (GRID, [(10.0, 20.0, 30.0, 40.0)], "as shares of the picture"),
    ],
)
def test_what_cannot_be_audited_is_refused(grids: Any, boxes: Any, message: str) -> None:
    audit = Audit()
    with pytest.raises(InputError, match=message):
        audit.add(report([[0, 1]], grids), boxes)
    assert audit.pictures == 0 and audit.stages == ()


def test_one_recipe_at_a_time() -> None:
    audit = Audit()
    audit.add(report([[0]]))
    with pytest.raises(InputError, match="one recipe at a time"):
        audit.add(report([[0]], stages=2))


# --------------------------------------------------------------------------------------------------- rank correlation


def test_rank_correlation_by_hand() -> None:
    """1 - 6 · Σd² / (n³ - n) without ties: ranks 1 2 3 4 5 against 2 1 4 3 5 have Σd² = 4."""
    assert rank_correlation(np.array([1.0, 2, 3, 4, 5]), np.array([20.0, 10, 40, 30, 99])) == pytest.approx(0.8)
    # Ties share their mean rank: 1.5, 1.5, 3 against 1, 2, 3 is (3/2) / sqrt(3/2 · 2).
    assert rank_correlation(np.array([7.0, 7, 9]), np.array([0.0, 1, 2])) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None
    assert rank_correlation(np.ones(1), np.ones(1)) is None and rank_correlation(np.ones(0), np.ones(0)) is None


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.randoms())
def test_rank_correlation_knows_order_alone(numbers: list[int], rng: Any) -> None:
    x, y = np.array(numbers, float), np.arange(len(numbers), dtype=float)
    rng.shuffle(y)
    value = rank_correlation(x, y)
    if len(set(numbers)) == 1:
        assert value is None
        return
    assert value is not None and -1 <= round(value, 9) <= 1
    assert rank_correlation(np.exp(x), 3 * y - 1) == pytest.approx(value)
    assert rank_correlation(-x, y) == pytest.approx(-value)
    assert rank_correlation(x, x) == pytest.approx(1)


def test_scores_are_held_against_raster_indices_picture_by_picture() -> None:
    """The first picture's scores rise, the second one's fall but for padding; a third has nothing to compare."""
    scores = [([0.1, 0.5, 0.7], [0, 8, 63]), ([0.9, 0.4, 99.0], [3, 5, -1]), ([2.0, 2.0, 2.0], [0, 1, 2])]
    stage = audited([0], [3], [0], scores=scores)
    assert stage.score_position is not None and stage.score_position.value == pytest.approx(0)  # mean of 1 and -1
    assert stage.to_dict()["score_position"] == {"value": pytest.approx(0), "low": None, "high": None}
    assert audited([0]).score_position is None and audited([0]).to_dict()["score_position"] is None


def heard(model: Any, recipe: Any, **inputs: Any) -> tuple[HeadAudit, torch.Tensor]:
    heads = HeadAudit(model, tp.load_recipe(recipe))
    with heads.listening(), torch.no_grad():
        return heads, model(**inputs).logits


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_heads_are_those_of_the_models_own_attention(family: str) -> None:
    """Against the attention weights that eager attention returns, layer by layer; listening changes no logit."""
    model = families.build(family, attention="eager")
    inputs = families.inputs(family, model, rows=[families.Row(), families.Row(after=9)])
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
    heads, logits = heard(model, "fastv", **inputs)
    assert torch.equal(plain.logits, logits)
    (criterion,) = heads.criteria
    vision = families.vision_mask(model, inputs["input_ids"])
    assert criterion.heads.shape == (len(plain.attentions), plain.attentions[0].shape[1])
    for layer, attention in enumerate(plain.attentions):
        found = []
        for row, at in enumerate(vision):
            rows = attention[row, :, -1, at].double().numpy()
            found.append([rank_correlation(each, np.arange(len(each), dtype=float)) for each in (rows.mean(0), *rows)])
        expected = np.array(found).mean(0)
        own = criterion.layers[layer]
        assert own is not None and own.value == pytest.approx(expected[0], abs=1e-3)
        np.testing.assert_allclose(criterion.heads[layer], expected[1:], atol=1e-3)
    json.dumps(criterion.to_dict(), allow_nan=False)


def test_stages_that_score_alike_are_one_criterion() -> None:
    model = families.build("llava")
    inputs = families.inputs("llava", model)
    two = heard(model, "feather", **inputs)[0]
    assert [len(each.stages) for each in two.criteria] in ([2], [1, 1])
    none = HeadAudit(model, tp.load_recipe("last"))
    with none.listening():
        model(**inputs)
    assert not none and none.criteria == () and HeadAudit(model, tp.load_recipe("fastv"))
    assert HeadAudit(model, tp.load_recipe("fastv")).criteria == ()  # nothing has been heard


# ------------------------------------------------------------------------------------------------ FEATHER's diagnosis


def biased(rope: bool) -> StageAudit:
    """Equal queries and keys up to a little noise, of width 128: what is left is distance (FEATHER's invariant k)."""
    side, width, pictures = 12, 128, 40
    length = side * side + 1
    generator = torch.Generator().manual_seed(0)
    q, k = torch.ones(pictures, 1, length, width), torch.ones(pictures, 1, length, width)
    k = k + 0.02 * torch.randn(k.shape, generator=generator)
    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    vision, text = torch.arange(length - 1), torch.tensor([length - 1])
    attention = attention_from_qk(rotate(q), rotate(k), vision=vision, text=text, before_rope=(q, k))
    hidden = torch.zeros(pictures, side * side, 4)
    tokens = tp.Tokens.from_hidden(hidden, text=torch.zeros(pictures, 1, 4), attention=attention)
    scores = AttentionScorer(rope=rope)(tokens, torch.ones(pictures, 1))
    kept = scores.topk(36).indices.sort().values
    return audited(*kept.tolist(), grids=(1, side, side))


def test_identical_keys_show_the_bias_of_rotary_distance() -> None:
    with_rope, without = biased(True).rows.bias, biased(False).rows.bias
    assert with_rope is not None and with_rope.value > 0.9 and with_rope.above(0.5)
    assert without is not None and abs(without.value) < 0.1 and not without.above(0) and not without.below(0)


# -------------------------------------------------------------------------------------------------------- the picture


def test_picture_shows_every_stage_and_is_the_same_every_time(tmp_path: Path) -> None:
    audit = Audit()
    audit.add(report([BOTTOM, LATTICE], merged=[[0], []], stages=2))
    figure = plot_audit(audit.stages, title="a title")
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(maps) == 2
    np.testing.assert_array_equal(maps[0], audit.stages[0].heat)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts[:2] == ["before layer 0", "kept 16 of 64 + 0.5 merged · bias +0.42"]
    first = save(figure, tmp_path / "a.png").read_bytes()
    assert save(plot_audit(audit.stages, title="a title"), tmp_path / "b.png").read_bytes() == first
    with pytest.raises(InputError, match="no stage to draw"):
        plot_audit(())


@pytest.mark.parametrize(
    ("top", "bottom", "third"),
    [(0.0, 0.2, 0), (0.2, 0.46, 0), (0.2, 0.48, 1), (0.5, 0.82, 1), (0.5, 0.84, 2), (1, 1, 2)],
)
def test_a_target_lies_in_the_third_of_its_centre(top: float, bottom: float, third: int) -> None:
    assert third_of((0.1, top, 0.3, bottom)) == third


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat("embedded", *load_embedded())


def test_audit_of_pictures_is_that_of_their_reports(chat: Chat) -> None:
    """As if every picture were run by hand: the same tokens are kept, and the untouched model is listened to."""
    cases, done = scene_cases(3, tasks=("ground",)), list[int]()
    pictures = [case.picture() for case in cases]
    survey = tp.audit(chat, "fastv", iter(pictures), "what colour is the circle ?", on_picture=done.append)
    own = Audit()
    for picture in pictures:
        with tp.attach(chat.model, "fastv") as attached:
            chat.generate(chat.inputs([picture], "what colour is the circle ?"), 1)
        own.add(attached.report)
    assert (done, survey.audit.pictures, survey.thirds) == ([1, 1, 1], 3, {})
    np.testing.assert_array_equal(survey.audit.stages[0].heat, own.stages[0].heat)
    assert len(survey.heads.criteria) == 1
    assert not tp.audit(chat, "last", pictures[:1], "where is it ?").heads  # nothing there scores by attention


def test_audit_of_cases_counts_right_answers_by_the_third_of_their_target(chat: Chat) -> None:
    """A case without a target adds its prefill alone; `accepts` says what is right, whatever the batches."""
    asked = list(islice(localisation_cases(), 12))
    top, middle, bottom = (next(c for c in asked if c.target and third_of(c.target) == third) for third in range(3))
    cases = [replace(top, accepts=lambda given, answer: False), middle, bottom, replace(top, target=None)]
    done: list[int] = []
    survey = audit_cases(chat, "fastv", iter(cases), batch_size=3, on_picture=done.append)
    assert (done, survey.audit.pictures) == ([3, 1], 4)
    plain = [chat.generate(chat.inputs([case.picture()], case.question), 16)[0] for case in cases[:3]]
    right = [case.right(chat.text(ids)) for case, ids in zip(cases[:3], plain, strict=True)]
    every = survey.thirds["all"]
    assert (every.targets, every.untouched) == (3, sum(right)) and not right[0] and any(right)
    assert survey.audit.stages[0].recall["all"].targets == 3
    for name, ok in zip(THIRDS, right, strict=True):
        assert (survey.thirds[name].targets, survey.thirds[name].untouched) == (1, ok)
    only = audit_cases(chat, "fastv", cases[3:]).thirds["all"]
    assert only.targets == 0 and only.accuracy("untouched") is None
