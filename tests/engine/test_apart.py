"""``pictures: apart``: each picture of a prompt keeps what it keeps alone, whatever stands beside it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from families import Row, build, inputs, row_inputs, sizes, vision_mask
from kinds import fixed, recipe, stage
from PIL import Image
from pruned import TOLERANCE, entering, run_both
from strategies import collate, sample
from torch import Tensor

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, RecipeError
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import no_products
from tokenprune.plot.kept import plot_kept
from tokenprune.stage import Stage

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
CLUSTER = {"type": "cluster", "share": 0.5, "per_cluster": 3}


def apart(*stages: Any, **more: Any) -> dict[str, Any]:
    return {**recipe("apart", *stages), "pictures": "apart", **more}


def after(scheduler: Any = None, **more: Any) -> dict[str, Any]:
    return stage("after_vision", scheduler or fixed(0.4), **more)


RECIPES = {
    "norm": apart(after(scorer="norm")),
    "chance": apart(after(scorer={"type": "random", "seed": 3})),
    "each has the count": apart(after(fixed(5), sampler="uniform")),
    "budget": apart(after({"type": "solved"}, scorer="norm"), budget={"keep": 0.3}),
    "renumber": apart(after(scorer="norm", positions="renumber")),
    "windows": apart(after(scorer="norm", grouper={"type": "tile", "rows": 2, "columns": 2})),
    "merged": apart(after(scorer="norm", recycler=CLUSTER)),
    "into survivors": apart(after(scorer="norm", recycler="nearest")),
    "two stages": apart(after(fixed(0.7), scorer="norm", recycler=CLUSTER), after(fixed(5), sampler="uniform")),
    "unlike each other": apart(after({"type": "solved"}, sampler="max_min"), budget={"keep": 0.4}),
}


def prompts(family: str) -> list[Row]:
    """Of three pictures, of one, and of two; of several sizes where the family has them."""
    first, second, third = (sizes(family) * 3)[:3]
    return [Row(images=(first, second, third)), Row(images=(second,)), Row(images=(third, first), between=4)]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("made", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_picture_keeps_what_an_engine_keeps_of_it(family: str, made: Any) -> None:
    """`PictureReducer`, which sees one picture and nothing else, is asked about each."""
    model: Any = build(family, layers=2)
    reducer = tp.PictureReducer(made, depth=2)
    batch = inputs(family, model, rows=prompts(family))
    with tp.attach(model, made) as attached:
        whole, left = entering(model, batch)
    report = attached.report
    for row, vision in enumerate(vision_mask(model, batch["input_ids"])):
        hidden, kept, first = [], [], 0
        grids = list(report.grids[row])
        while grids:
            picture = [grids.pop(0) for _ in range(2 if family == "llava_onevision" else 1)]
            n = sum(t * h * w for t, h, w in picture)
            states, index = reducer.prune(whole[row, vision][first : first + n], picture)
            assert len(index) == reducer.kept(picture)
            hidden.append(states)
            kept.append(index + first)
            first += n
        expected = torch.cat(kept)
        assert first == int(vision.sum())
        assert report.stages[-1].left[row, : len(expected)].tolist() == expected.tolist()
        assert report.stages[-1].sizes[row] == len(expected)
        states = torch.cat(hidden)
        there = (left[row][:, None] == states[None]).all(-1).any(0)
        assert bool(there.all())


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", ["norm", "merged", "into survivors", "two stages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_is_the_masked_one(family: str, name: str) -> None:
    model: Any = build(family, layers=3)
    difference, (sequences, reference), _ = run_both(model, inputs(family, model, rows=prompts(family)), RECIPES[name])
    assert difference < TOLERANCE and torch.equal(sequences, reference)


@torch.inference_mode()
def test_a_sample_of_a_batch_is_the_sample_alone() -> None:
    model: Any = build("qwen2_5_vl", layers=2)
    batch = inputs("qwen2_5_vl", model, rows=prompts("qwen2_5_vl"))
    with tp.attach(model, RECIPES["two stages"]) as attached:
        together = model.generate(**batch, max_new_tokens=3)
        kept = attached.report.stages[-1].left
        for row in range(3):
            alone = model.generate(**row_inputs(batch, row), max_new_tokens=3)
            assert together[row, -3:].tolist() == alone[0, -3:].tolist()
            own = attached.report.stages[-1].left[0]
            assert kept[row, : len(own)].tolist() == own.tolist()


@torch.inference_mode()
def test_one_picture_is_the_same_either_way_and_several_are_not() -> None:
    model: Any = build("qwen2_5_vl", layers=2)
    made = RECIPES["norm"]
    for rows, same in ([Row()], True), (prompts("qwen2_5_vl")[:1], False):
        batch = inputs("qwen2_5_vl", model, rows=rows)
        kept = []
        for one in (made, {**made, "pictures": "together"}):
            with tp.attach(model, one) as attached:
                model(**batch)
            kept.append(attached.report.stages[0].left.tolist())
        assert (kept[0] == kept[1]) is same
    assert tp.load_recipe(made).fingerprint != tp.load_recipe({**made, "pictures": "together"}).fingerprint
    assert tp.build(made, depth=2).fingerprint != tp.build({**made, "pictures": "together"}, depth=2).fingerprint


@torch.inference_mode()
def test_a_picture_kept_whole_beside_pruned_ones_has_no_scores_and_is_drawn_whole() -> None:
    model: Any = build("qwen2_5_vl", layers=2)
    batch = inputs("qwen2_5_vl", model, rows=[Row(images=((8, 8), (8, 12)))])
    with tp.attach(model, apart(after(fixed(18), scorer="norm"))) as attached:
        model(**batch)
    report = attached.report
    (made,) = report.stages
    assert made.scores is not None and made.scores[0].isnan().tolist() == [True] * 16 + [False] * 24
    assert made.kept[0, :16].tolist() == list(range(16)) and made.sizes == (16 + 18,)
    assert "in 2 pictures: 16 18" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)
    figure = plot_kept([Image.new("RGB", (40, 40)), Image.new("RGB", (60, 40))], report)
    titles = [text.get_text() for axes in figure.axes for text in axes.texts] + [a.get_title() for a in figure.axes]
    assert any("16 of 16 here" in text for text in titles) and any("18 of 24 here" in text for text in titles)


class Looking(Scorer):
    """Notes what it is shown."""

    reads = Needs(grid=True, question=True)
    multiply_adds = no_products

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tokens] = []

    def forward(self, tokens: Tokens, weights: Tensor | None = None) -> Tensor:
        self.seen.append(tokens)
        return -tokens.only_valid(tokens.origin.float())


@torch.inference_mode()
def test_a_part_is_shown_one_picture_as_if_it_were_the_prompt() -> None:
    model: Any = build("qwen2_5_vl", layers=2)
    batch = inputs("qwen2_5_vl", model, rows=prompts("qwen2_5_vl"))
    scorer = Looking()
    stages = [Stage(place="after_vision", scorer=scorer, scheduler=FixedScheduler(keep=4))]
    with tp.attach(model, tp.Pipeline(stages, pictures="apart")) as attached:
        model(**batch)
    pictures = [grid for row in attached.report.grids for grid in row]
    assert [tokens.grids for tokens in scorer.seen] == [((grid,),) for grid in pictures]
    for tokens, grid in zip(scorer.seen, pictures, strict=True):
        tokens.check()
        assert tokens.cell[0].tolist() == [list(cell) for cell in np.ndindex(*grid)]
        assert tokens.total == (len(tokens.cell[0]),)


@torch.inference_mode()
def test_to_keep_all_changes_no_bit() -> None:
    model: Any = build("llava_onevision", layers=2)
    batch = inputs("llava_onevision", model, rows=prompts("llava_onevision"))
    plain = model(**batch).logits
    with tp.attach(model, apart(after({"type": "solved"}, scorer="norm"), budget={"keep": 1.0})):
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_model_tells_prompts_apart_that_keep_as_many_of_other_pictures() -> None:
    """As many tokens of the same two pictures, in another order: another graph, and the answers of the eager one."""
    model: Any = build("qwen2_5_vl", layers=2)
    made = apart(after(fixed(0.35), scorer="norm", recycler="nearest"))
    first, second = sizes("qwen2_5_vl")[:2]
    batches = [inputs("qwen2_5_vl", model, rows=[Row(images=pair)]) for pair in ((first, second), (second, first))]
    with tp.attach(model, made):
        expected = [model.generate(**batch, max_new_tokens=4) for batch in batches]
    with tp.attach(model, made, compile={"backend": "eager"}) as attached:
        got = [model.generate(**batch, max_new_tokens=4) for batch in batches]
    assert all(map(torch.equal, expected, got))
    assert attached.report.graphs is not None and attached.report.graphs.breaks == 0


MERGED = {
    "one": apart(after(fixed(0.4), scorer="norm", recycler=CLUSTER)),
    "two": apart(
        after(fixed(0.96), scorer="norm", recycler={"type": "cluster", "per_cluster": 1000}),
        after({"type": "pyramid", "keep": 0.5}, sampler="uniform"),
    ),
}


@torch.inference_mode()
def test_a_plan_counts_the_merged_tokens_of_each_picture() -> None:
    """They are rounded picture by picture: nine of three pictures, where one of three times the size makes eight."""
    model: Any = build("llava", layers=2)
    batch, made = inputs("llava", model, rows=[Row(images=sizes("llava")[:1] * 3)]), MERGED["one"]
    with tp.attach(model, made) as attached:
        expected = model.generate(**batch, max_new_tokens=3)
    report, pipeline = attached.report, tp.build(made, depth=2)
    for row, grids in enumerate(report.grids):
        assert pipeline.summary(report.total[row], grids).final == report.stages[-1].sizes[row]
    with tp.attach(model, made, compile={"backend": "eager"}):
        assert torch.equal(model.generate(**batch, max_new_tokens=3), expected)


def test_stages_run_by_hand_take_what_the_stage_before_left_of_each_picture() -> None:
    tokens = collate([sample((1, 5, 5), (1, 5, 5), (1, 5, 5))])
    for made in MERGED.values():
        pipeline = tp.build(made, depth=2)
        results = pipeline.run("after_vision", tokens)
        assert len(results) == len(pipeline)
        assert results[-1].tokens.sizes == (pipeline.summary(75, tokens.grids[0]).final,)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            apart(after(raters="last_text", scorer={"type": "attention", "layer": "next"})),
            r"stage_0 \(after_vision\): attention is of the whole prompt",
        ),
        (
            apart(stage(1, fixed(4), scorer="norm")),
            r"stage_0 \(before_layer: 1\): pictures can be taken apart after_vision",
        ),
        (apart(after({"type": "outliers"}, scorer="norm")), "must be known from its shape"),
        (apart(after(rectifier="log_mass")), "a rectifier acts on the whole prompt"),
        (apart(after({"type": "solved"}), budget={"flops": 0.5}), "must be known from its shape"),
        (apart(after(), pictures="appart"), "pictures"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(made: Any, reason: str) -> None:
    with pytest.raises((RecipeError, BudgetError), match=reason):
        tp.attach(build("llava", layers=2), made)
