"""The ledger against published numbers, and what must hold for any shape."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from towers import INSIDE

import tokenprune as tp
from tokenprune.builder import build
from tokenprune.cost.account import Ledger, account, readable, vision_only
from tokenprune.cost.presets import PRESETS
from tokenprune.errors import InputError, UnstatedCostWarning
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.work import Work
from tokenprune.recipe import list_recipes, load_recipe

LLAVA = PRESETS["llava-1.5-7b"]


def feather_paper(recipe: object, **more: object) -> float:
    """FLOPs reduction as the FEATHER paper counts: 729 vision tokens alone, 2 MLP matrices."""
    told = tp.ledger(LLAVA, recipe, grids=[(1, 27, 27)], matrices=2, **more)  # type: ignore[arg-type]
    return 1 - told.share("papers")


def stage(place: int, keep: float) -> dict[str, object]:
    scheduler = {"type": "fixed", "keep": keep}
    return {"name": f"at{place}", "place": {"before_layer": place}, "scorer": "random", "scheduler": scheduler}


def plain(*stages: dict[str, object]) -> dict[str, object]:
    return {"version": 1, "name": "plain", "stages": list(stages)}


@pytest.mark.parametrize(
    ("variant", "ours", "table"), [("192", 2.1339, 2.14), ("128", 1.7310, 1.72), ("64", 1.3141, 1.30)]
)
def test_sparsevlm_table_1(variant: str, ours: float, table: float) -> None:
    """Its code's formula on its counts with 118 other tokens; the printed table is up to 1.1 % off its own formula."""
    told = tp.ledger("llava-1.5-7b", load_recipe("sparsevlm-v1.5", variant=variant), text=118)
    assert told.untouched.decoder / 1e12 == pytest.approx(4.6206, abs=5e-5)
    assert told.reduced.decoder / 1e12 == pytest.approx(ours, abs=5e-5)
    assert told.reduced.decoder / 1e12 == pytest.approx(table, abs=0.0145)


@pytest.mark.parametrize(("tokens", "expected"), [(576, 3817.152), (192, 1253.057), (128, 833.224), (64, 415.538)])
def test_vision_tokens_alone_in_every_layer(tokens: int, expected: float) -> None:
    assert vision_only(LLAVA.decoder, [tokens] * 32) / 1e9 == pytest.approx(expected, abs=5e-4)
    told = tp.ledger("llava-1.5-7b", "none", tokens=tokens, text=0)
    assert told.untouched.papers == told.untouched.decoder == told.reduced.decoder


@pytest.mark.parametrize(
    ("recipe", "tokens", "untouched", "reduced"),
    [
        ("fastv", 576, 3.817, 2.007),
        ("pyramiddrop", 576, 3.817, 1.777),
        ("fastv", 2880, 20.83, 10.55),
        ("pyramiddrop", 2880, 20.83, 9.46),
    ],
)
def test_pyramiddrop_table_1(recipe: str, tokens: int, untouched: float, reduced: float) -> None:
    told = tp.ledger(LLAVA, recipe, tokens=tokens)
    assert told.untouched.papers / 1e12 == pytest.approx(untouched, abs=0.005)
    assert told.reduced.papers / 1e12 == pytest.approx(reduced, abs=0.005)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (load_recipe("fastv", variant="k3-r75"), 0.686),
        (plain(stage(8, 182)), 0.568),
        (plain(stage(3, 196)), 0.669),
        (plain(stage(8, 196)), 0.554),
        (plain(stage(3, 243)), 0.6115),
        (plain(stage(8, 243)), 0.5061),
        (load_recipe("feather", variant="fixed"), 0.642),
        (plain(stage(8, 218), stage(16, 65), stage(24, 19)), 0.649),
        (plain(stage(8, 437), stage(16, 262), stage(24, 157)), 0.462),
    ],
)
def test_feather_table_1(recipe: object, expected: float) -> None:
    assert feather_paper(recipe) == pytest.approx(expected, abs=6e-4)


def test_the_embedded_model_by_its_name() -> None:
    """As the command line takes it; other names that are no model suggest it."""
    model, _ = tp.load("embedded")
    told = tp.ledger("embedded", "fastv", keep=0.5)
    assert told.model == "embedded" and told.reduced == tp.ledger(model, "fastv", keep=0.5).reduced
    with pytest.raises(InputError, match=r"no such model folder: embeded .did you mean 'embedded'"):
        tp.ledger("embeded", "fastv")


def test_an_adaptive_recipe_is_an_expectation() -> None:
    assert feather_paper("feather") == pytest.approx(0.642, abs=6e-4)
    assert not tp.ledger(LLAVA, "feather", grids=[(1, 27, 27)]).exact
    assert tp.ledger(LLAVA, load_recipe("feather", variant="fixed"), grids=[(1, 27, 27)]).exact


def test_what_really_ran_replaces_what_is_expected() -> None:
    """Counts of a report: the same arithmetic at other numbers, and the scheduler's own work stays."""
    pipeline = build("sparsevlm", depth=32)
    size = {"total": 576, "grids": [(1, 24, 24)], "text": 60, "question": 30}
    expected = account(LLAVA, pipeline, **size)
    counts = [stage.kept for stage in expected.reduced.stages]
    ran = account(LLAVA, pipeline, **size, kept=counts)
    assert (expected.exact, ran.exact) == (False, True) and ran.reduced == expected.reduced
    fewer = account(LLAVA, pipeline, **size, kept=[count - 1 for count in counts])
    assert [stage.kept for stage in fewer.reduced.stages] == [count - 1 for count in counts]
    assert fewer.reduced.prefill < ran.reduced.prefill < ran.untouched.prefill
    with pytest.raises(InputError, match="kept has 1 counts for 3 stages"):
        account(LLAVA, pipeline, **size, kept=[5])


def test_a_layer_by_hand() -> None:
    """Grouped queries: width 3584, 28 heads of 128, 4 key heads, MLP 18944; 100 vision tokens and 10 others."""
    row = tp.ledger("qwen2.5-vl-7b", "none", tokens=100, text=10).untouched.rows[5]
    q_and_o, k_and_v, mlp = 2 * 3584 * 3584, 2 * 3584 * 512, 3 * 3584 * 18944
    assert (row.layer, row.vision, row.tokens) == (5, 100, 110)
    assert row.linear == 110 * (q_and_o + k_and_v + mlp)
    assert row.attention == 2 * 110 * 110 * 28 * 128
    assert row.causal == sum(2 * (i + 1) * 28 * 128 for i in range(110))
    assert row.kv_bytes == 110 * 2 * 4 * 128 * 2


def test_decoding_step_by_step() -> None:
    """Each layer's steps see what that layer kept."""
    told = tp.ledger("llava-1.5-7b", "fastv", text=20, new_tokens=4).reduced
    linear, head = LLAVA.decoder.linear(), 4096 * 32064
    steps = [sum(linear + 2 * (row.tokens + i) * 4096 for row in told.rows) + head for i in (1, 2, 3)]
    assert told.decode == sum(steps)
    assert told.lm_head == head
    assert tp.ledger("llava-1.5-7b", "fastv").reduced.decode == 0


def test_method_by_hand() -> None:
    """FastV: the last text token against all 676 tokens; its query and their keys are the previous layer's own.

    What it pays to them is weighted once more for each of 32 heads: a mean over raters.
    """
    told = tp.ledger("llava-1.5-7b", "fastv", text=100, question=30).reduced
    assert [stage.parts for stage in told.stages] == [{"scorer": 676 * (4096 + 32)}]
    released = tp.ledger("llava-1.5-7b", "pyramiddrop-code", text=100, question=30).reduced.stages
    assert released[0].parts == {"scorer": 4096**2 * (1 + 676) + 676 * (4096 + 32)}, "the next layer has not run"
    assert told.prompt == told.decoder + told.method
    cluster = tp.ledger("llava-1.5-7b", load_recipe("sparsevlm-v1.5", variant="192"), text=100).reduced.stages[0]
    assert cluster.parts["scorer"] == 100 * 676 * (4096 + 32)
    recycled, clusters = 83, 9  # of 276 dropped tokens
    assert cluster.parts["raters"] == 576 * 100 * 4096
    assert cluster.parts["recycler"] == recycled * 4096 * (recycled + clusters) + recycled * clusters


def test_views_add_up() -> None:
    told = tp.ledger("llava-1.5-7b", "sparsevlm", new_tokens=3).reduced
    parts = told.vision_tower + told.projector + told.decoder + told.method + told.lm_head + told.decode
    assert told.end_to_end == parts
    assert told.kv_bytes == sum(row.kv_bytes for row in told.rows)
    assert told.vision_tower == 577 * 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 24 * 2 * 577**2 * 1024 + 576 * 588 * 1024
    assert told.projector == 576 * (1024 * 4096 + 4096 * 4096)


def test_tiles_of_llava_next() -> None:
    """The overview and 2 × 2 tiles, whose rows end with newlines; 2880 tokens without newlines are five tiles too."""
    tile = PRESETS["llava-1.5-7b"].vision.tower(576, [(1, 24, 24)])
    told = tp.ledger("llava-next-7b", "none")
    assert (told.total, told.untouched.vision_tower) == (576 + 48 * 49, 5 * tile)
    assert tp.ledger("llava-next-7b", "none", tokens=2880).untouched.vision_tower == 5 * tile
    wide = tp.ledger("llava-next-7b", "none", grids=[(1, 24, 24), (1, 20, 49)]).untouched
    assert wide.vision_tower == 3 * tile


def test_windows_of_qwen() -> None:
    """6 × 9 vision tokens in windows of 4 × 4 are 6 windows; four layers of 32 see all 216 patches."""
    vision = PRESETS["qwen2.5-vl-7b"].vision
    linear = 216 * (32 * (4 * 1280**2 + 3 * 1280 * 3420) + 3 * 2 * 14**2 * 1280)
    sides = [(rows, wide) for rows in (4, 2) for wide in (4, 4, 1)]
    windowed = sum((4 * rows * wide) ** 2 for rows, wide in sides)
    assert vision.tower(54, [(1, 6, 9)]) == linear + 2 * 1280 * (28 * windowed + 4 * 216**2)
    assert vision.tower(108, [(2, 6, 9)]) == 2 * vision.tower(54, [(1, 6, 9)])  # frames do not see each other


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if name != "none" and name not in INSIDE])
def test_more_tokens_cost_more(recipe: str) -> None:
    """In every view; and keeping all costs what the untouched model costs."""
    told = [tp.ledger(LLAVA, recipe, average=keep, new_tokens=5) for keep in (0.5, 0.6, 0.8, 1.0)]
    for view in ("papers", "prompt", "end_to_end", "kv_bytes", "decode"):
        costs = [getattr(one.reduced, view) for one in told]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1] == getattr(told[-1].untouched, view)
    assert told[-1].reduced.method == 0


def test_later_places_cost_more() -> None:
    costs = [tp.ledger(LLAVA, plain(stage(place, 100))).reduced.prompt for place in range(32)]
    assert all(a < b for a, b in pairwise(costs))


def test_dict_and_table_hold_the_numbers() -> None:
    told = tp.ledger("llava-1.5-7b", "fastv", text=118, new_tokens=8)
    read = json.loads(json.dumps(told.to_dict()))
    assert read["unit"] == "multiply-adds"
    assert read["reduced"]["layers"][2]["vision"] == 288
    assert read["shares"]["papers"] == pytest.approx(2.007 / 3.817, abs=1e-3)
    assert read["reduced"]["stages"][0]["parts"]["scorer"] == told.reduced.method
    assert "3.817 T →   2.007 T  52.6%" in str(told)
    assert "≈" not in str(told)
    assert "≈" in str(tp.ledger("llava-1.5-7b", "sparsevlm"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (2.1339e12, "2.134 T"), (999_960, "1 M"), (5e15, "5000 T")],
)
def test_readable(number: float, text: str) -> None:
    assert readable(number) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total": 0}, "ledger: total must be at least 1, got 0"),
        ({"text": -1}, "ledger: text must be at least 0, got -1"),
        ({"question": 21}, r"ledger: question \(21 tokens\) is part of text \(20 tokens\), it cannot be longer"),
        ({"new_tokens": 0}, "ledger: new_tokens and kv_bytes must be at least 1, got 0 and 2"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, int], message: str) -> None:
    numbers = {"total": 576, "text": 20, **changes}
    with pytest.raises(InputError, match=f"^{message}$"):
        account(LLAVA, build("fastv", depth=32), grids=[(1, 24, 24)], **numbers)


def test_a_shape_of_ones_own() -> None:
    half = replace(LLAVA, name="half", decoder=replace(LLAVA.decoder, layers=16))
    told: Ledger = tp.ledger(half, "none", text=0)
    assert 2 * told.untouched.decoder == tp.ledger(LLAVA, "none", text=0).untouched.decoder


class SilentSampler(TopKSampler):
    """A part of somebody else's, which does not say what it costs."""

    def multiply_adds(self, work: Work) -> None:
        return None


def silent_pipeline(**more: Any) -> tp.Pipeline:
    (like,) = tp.build("fastv", keep=0.5, depth=32)
    parts = {"scheduler": like.scheduler, "scorer": like.scorer, "recycler": like.recycler, "raters": like.raters}
    stage = tp.Stage(place=like.place, name="quiet", sampler=SilentSampler(), **parts)
    return tp.Pipeline([stage], depth=32, name="mine", **more)


def test_a_part_that_states_no_cost_is_named_and_never_counts_as_nothing() -> None:
    """Its stage's other parts count as ever."""
    shape, sizes = PRESETS["llava-1.5-7b"], {"total": 576, "grids": ((1, 24, 24),), "text": 64}
    told = account(shape, silent_pipeline(budget=tp.Budget("keep", 0.5)), **sizes)
    stated = account(shape, tp.build("fastv", keep=0.5, depth=32), **sizes)
    assert told.reduced.unstated == ("sampler 'silent'",) and stated.reduced.unstated == ()
    assert told.reduced.method == stated.reduced.method > 0
    assert told.to_dict()["unstated"] == ["sampler 'silent'"]
    assert "not stated, in no total: sampler 'silent'" in str(told)


def test_a_budget_of_multiply_adds_warns_of_parts_that_state_none() -> None:
    shape, sizes = PRESETS["llava-1.5-7b"], {"total": 576, "grids": ((1, 24, 24),), "text": 64}
    with pytest.warns(UnstatedCostWarning, match="mine: what sampler 'silent' costs is not stated") as warned:
        account(shape, silent_pipeline(budget=tp.Budget("flops", 0.7)), **sizes)
    assert len(warned) == 1  # of all the plans that the solver has looked at


def test_savings_inside_the_tower() -> None:
    """LLaVA-1.5 keeps half of 576 patches in the last 12 of 24 blocks of width 1024, and of its tokens from layer 0."""
    inside = {"place": {"in_vision": {"block": 12}}, "scheduler": {"type": "fixed", "keep": 0.5}, "scorer": "norm"}
    told = tp.ledger("llava-1.5-7b", {"version": 1, "name": "inside", "stages": [inside]})

    def block(n: int) -> int:
        return n * 1024 * (4 * 1024 + 2 * 4096) + 2 * n**2 * 1024

    assert told.exact
    assert told.untouched.vision_tower - told.reduced.vision_tower == 12 * (block(577) - block(289))
    assert {row.vision for row in told.reduced.rows} == {288}
    assert told.reduced.projector == told.untouched.projector  # the whole grid passes it


@pytest.mark.parametrize("name", ["divprune", "random"])
def test_pictures_apart_cost_what_each_costs_alone(name: str) -> None:
    """Likeness of all pairs is worked out within each picture; together, across them too."""
    pictures = [(1, 24, 24), (1, 20, 30), (1, 7, 9)]
    each = load_recipe(name, keep=0.3, sets=["pictures=apart"])
    several = tp.ledger(LLAVA, each, grids=pictures).reduced.stages[0]
    alone = [tp.ledger(LLAVA, each, grids=[grid]).reduced.stages[0] for grid in pictures]
    assert several.kept == sum(cost.kept for cost in alone) == sum(int(0.3 * h * w) for _, h, w in pictures)
    assert several.parts == {role: sum(cost.parts[role] for cost in alone) for role in several.parts}
    together = tp.ledger(LLAVA, load_recipe(name, keep=0.3), grids=pictures).reduced.stages[0]
    assert several.total < together.total or not together.total
