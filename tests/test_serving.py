"""`PictureReducer`: what it promises of a picture, what it keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Row, build, inputs, sizes
from kinds import fixed, recipe, stage
from pruned import entering

import tokenprune as tp
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError

FEATURES = ("divprune", "uniform", "random", "last", "pool", "evs")


def one_stage(**more: Any) -> dict[str, Any]:
    return recipe("own", stage("after_vision", more.pop("scheduler", fixed(0.4)), **more))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize(
    "made",
    [
        one_stage(scorer="norm"),
        one_stage(scorer={"type": "random", "seed": 3}, positions="renumber"),
        one_stage(scorer="norm", recycler={"type": "cluster", "share": 0.5, "per_cluster": 3}),
        recipe(
            "two", stage("after_vision", fixed(0.7), scorer="norm"), stage("after_vision", fixed(5), sampler="uniform")
        ),
        one_stage(sampler="uniform", grouper={"type": "image"}),
        "divprune",
        "none",
    ],
    ids=lambda made: made if isinstance(made, str) else None,
)
@torch.inference_mode()
def test_a_picture_keeps_what_attach_keeps(family: str, made: Any) -> None:
    model: Any = build(family, layers=2)
    reducer = tp.PictureReducer(made, depth=2)
    for size in sizes(family)[:2]:
        batch = inputs(family, model, rows=[Row(images=(size,))])
        with tp.attach(model, made) as attached:
            whole, left = entering(model, batch)
        vision = batch["input_ids"][0] == model.config.image_token_id
        grids = attached.report.grids[0]  # two in LLaVA-OneVision: overview and tiles
        hidden, kept = reducer.prune(whole[0, vision], grids)
        stages = attached.report.stages
        expected = stages[-1].left[0] if stages else torch.arange(int(vision.sum()))
        assert kept.tolist() == expected.tolist()
        assert reducer.kept(grids) == len(kept) == len(hidden)
        start = int(vision.nonzero()[0])
        assert torch.equal(hidden, left[0, start : start + len(kept)])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@torch.inference_mode()
def test_a_stage_is_shown_the_cells_that_attach_shows_it(family: str) -> None:
    model: Any = build(family, layers=2)
    made = one_stage(sampler="uniform", grouper="image")
    reducer = tp.PictureReducer(made, depth=2)
    batch = inputs(family, model, rows=[Row()])
    seen: list[Tokens] = []
    with tp.attach(model, made) as attached:
        for pipeline in (attached.engine.pipeline, reducer.pipeline):
            pipeline.stages[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**batch)
    grids = attached.report.grids[0]
    reducer.prune(torch.randn(*seen[0].hidden.shape[1:]), grids)
    assert torch.equal(seen[0].cell, seen[1].cell) and seen[0].grids == seen[1].grids == (grids,)
    assert list(map(type, seen[0].grids[0])) == list(map(type, seen[1].grids[0]))  # tiles are told from plain grids


@pytest.mark.parametrize("name", FEATURES)
def test_counts_come_from_shapes_alone(name: str) -> None:
    reducer = tp.PictureReducer(name, depth=4, keep=0.25)
    for grid in ((1, 6, 6), (1, 3, 11), (1, 1, 1), (1, 24, 24)):
        torch.manual_seed(0)
        hidden, kept = reducer.prune(torch.randn(grid[0] * grid[1] * grid[2], 16), grid)
        assert len(hidden) == len(kept) == reducer.kept(grid)
        assert reducer.kept(grid[1:]) == reducer.kept(grid)


def test_signals_of_the_tower_come_from_the_engine() -> None:
    made = one_stage(scorer="class_attention")
    with pytest.raises(RecipeError, match=r"it reads class_attention of the tower, and the engine gives none"):
        tp.PictureReducer(made)
    with pytest.raises(RecipeError, match=r"and the engine gives keys"):
        tp.PictureReducer(made, signals={"keys"})
    reducer = tp.PictureReducer(made, signals={"class_attention"})
    attention = torch.rand(12, generator=torch.Generator().manual_seed(0))
    _, kept = reducer.prune(torch.randn(12, 8), (3, 4), {"class_attention": attention})
    assert kept.tolist() == sorted(attention.topk(4).indices.tolist())
    with pytest.raises(InputError, match="class_attention"):
        reducer.prune(torch.randn(12, 8), (3, 4))
    with pytest.raises(InputError, match=r"expected class_attention \[12, ...\], got \(11,\)"):
        reducer.prune(torch.randn(12, 8), (3, 4), {"class_attention": attention[:11]})


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("fastv", "between layers of the language model"),
        ("cdpruner", "rated by text"),
        (one_stage(scorer="attention", raters="last_text"), "rated by text"),
        ("tome", "an engine's tower runs whole"),
        (one_stage(scheduler={"type": "outliers"}, scorer="norm"), "counts depend on the data"),
        (one_stage(rectifier="log_mass"), "rectifier adds to attention"),
        ({**recipe("f", {"place": "after_vision"}), "budget": {"flops": 0.5}}, "length of each prompt"),
        (
            recipe("mixed", stage("after_vision", fixed(9)), stage("after_vision", fixed(5), positions="renumber")),
            "some renumber",
        ),
    ],
)
def test_what_an_engine_cannot_run_is_refused_with_the_reason(made: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        tp.PictureReducer(made, depth=8)


def test_every_shipped_recipe_is_served_or_refused() -> None:
    """With one line that says why; none is taken that then fails on a picture."""
    served, refused = [], []
    for name in tp.list_recipes():
        try:
            reducer = tp.PictureReducer(name, depth=8)
        except RecipeError as error:
            refused.append(str(error))
            continue
        hidden, kept = reducer.prune(torch.randn(144, 32), (12, 12))
        assert len(hidden) == len(kept) == reducer.kept((12, 12))
        served.append(name)
    assert all("\n" not in reason and reason.startswith("serving: ") for reason in refused)
    assert {"divprune", "uniform", "random", "none"} <= {name.rpartition("/")[2] for name in served}


def test_shapes_that_do_not_fit_are_named() -> None:
    reducer = tp.PictureReducer("uniform", depth=8, keep=4)
    with pytest.raises(InputError, match=r"expected hidden \[12, D\] of \(1, 3, 4\), got \(11, 8\)"):
        reducer.prune(torch.randn(11, 8), (3, 4))
    with pytest.raises(InputError, match=r"expected a grid \(T, H, W\) or \(H, W\)"):
        reducer.kept((12,))  # type: ignore[arg-type]


def test_other_tokens_have_another_fingerprint() -> None:
    prints = {tp.PictureReducer("random", depth=8, keep=keep).fingerprint for keep in (16, 17, 16)}
    assert len(prints) == 2
