"""The ledger's closed form against two counters that watch the real modules run, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, sizes, vision_mask

import tokenprune as tp
from tokenprune.cost.account import Ledger
from tokenprune.families.shape import model_shape
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.work import Work
from tokenprune.study.counters import Traceable, fvcore_counts, torch_counts

RECIPES = [None, "sparsevlm-v1.5", "fastv", "feather", "sparsevlm-plus", "pyramiddrop-code"]


def prompt(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, a batch of one with the family's largest picture, and what the ledger must be told of it."""
    model = build(family)
    size = max(sizes(family), key=lambda size: size[0] * size[1])
    batch = inputs(family, model, rows=[Row(before=3, images=(size,), after=9)])
    vision = vision_mask(model, batch["input_ids"])[0]
    first = int(vision.nonzero()[0])
    with tp.attach(model, "uniform") as attached, torch.no_grad():
        model(**batch)
    told = {
        "grids": attached.report.grids[0],
        "tokens": int(vision.sum()),
        "text": int((~vision).sum()),
        "question": int((~vision[first:]).sum()),
    }
    return model, batch, told


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_counts_the_same(family: str, recipe: str | None) -> None:
    """To the last multiply-add. A stage runs in the hook of its layer, so PyTorch counts it there."""
    model, batch, told = prompt(family)
    budget = {} if recipe is None else {"keep": 0.4}
    ledger: Ledger = tp.ledger(model, recipe or "none", **told, **budget)
    if recipe is None:
        counts = torch_counts(model, batch)
    else:
        with tp.attach(model, recipe, keep=0.4) as attached:
            counts = torch_counts(model, batch)
        assert attached.report.vision_tokens[0].tolist() == [row.vision for row in ledger.reduced.rows]
    for row in ledger.reduced.rows:
        method = sum(stage.total for stage in ledger.reduced.stages if stage.layer == row.layer)
        assert counts[f"model.language_model.layers.{row.layer}"] == row.total + method
    assert counts["lm_head"] == ledger.reduced.lm_head
    tower, projector = vision_counts(family, counts)
    assert (tower, projector) == (ledger.reduced.vision_tower, ledger.reduced.projector)
    assert bool(ledger.reduced.method) == (recipe is not None)


OF_THE_TOWER = ["fastervlm", "hiprune", "vispruner", "vscan", "prumerge", "prumerge-plus", "topv", "scope", "holov"]


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_same_where_the_tower_is_read(family: str) -> None:
    model, batch, told = prompt(family)
    for recipe in OF_THE_TOWER:
        if recipe == "holov" and len(told["grids"]) > 1:  # stretches are counted as those of one picture
            continue
        with tp.attach(model, recipe, keep=0.4):
            counted = torch_counts(model, batch)[""]
        assert counted == tp.ledger(model, recipe, **told, keep=0.4).reduced.prefill, recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_the_tower_are_counted_with_all_heads(family: str) -> None:
    """VisionZip compares means over two heads: half of what the ledger counts, which knows no heads of the tower."""
    model, batch, told = prompt(family)
    with tp.attach(model, "visionzip", keep=0.4) as attached:
        counted = torch_counts(model, batch)[""]
    kept = attached.report.stages[0].kept.shape[1]
    compared = (told["tokens"] - kept) * (attached.report.stages[0].sizes[0] - kept)
    ledger: Ledger = tp.ledger(model, "visionzip", **told, keep=0.4)
    assert ledger.reduced.prefill - counted == compared * model_shape(model).vision.width // 2


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("share", [0.75, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_flops_is_what_torch_counts(family: str, share: float) -> None:
    """The whole prefill stays within the share, and the ledger knows it to the last multiply-add."""
    model, batch, told = prompt(family)
    untouched = torch_counts(model, batch)[""]
    ledger: Ledger = tp.ledger(model, "pyramiddrop-code", **told, flops=share)
    with tp.attach(model, "pyramiddrop-code", flops=share):
        reduced = torch_counts(model, batch)[""]
    assert (untouched, reduced) == (ledger.untouched.prefill, ledger.reduced.prefill)
    assert (share - 0.1) * untouched < reduced <= share * untouched


@pytest.mark.parametrize("energy", [None, 0.9])
def test_an_adaptive_recipe_costs_what_torch_counts(energy: float | None) -> None:
    """The rank of raters × tokens, by its Gram matrix: no estimate, at the count that the recipe came to."""
    model, batch, told = prompt("llava")
    scheduler = {"type": "rank_ratio", "scale": 0.5, "energy": energy}
    parts = {"place": {"before_layer": 3}, "raters": "all_text", "scorer": "norm", "scheduler": scheduler}
    recipe: dict[str, Any] = {"version": 1, "stages": [parts]}
    with tp.attach(model, recipe) as attached:
        counts = torch_counts(model, batch)
    kept = attached.report.stages[0].kept.shape[1]
    stage = model_shape(model).decoder
    expected = RankRatioScheduler(scale=0.5, energy=energy).multiply_adds(
        Work(
            tokens=told["tokens"],
            kept=kept,
            total=told["tokens"],
            text=told["question"],
            raters=told["question"],
            sequence=told["tokens"] + told["text"],
            width=stage.width,
            heads=stage.heads,
            kv_heads=stage.kv_heads,
            head_dim=stage.head_dim,
        )
    )
    layer = tp.ledger(model, recipe, **told, final=kept).reduced.rows[3].total
    assert counts["model.language_model.layers.3"] == layer + expected


def vision_counts(family: str, counts: dict[str, int]) -> tuple[int, int]:
    """Tower and projector."""
    if family.startswith("llava"):
        return counts["model.vision_tower"], counts["model.multi_modal_projector"]
    mergers = [count for name, count in counts.items() if name.removeprefix("model.visual.").split(".")[0] == "merger"]
    merger = max(mergers)
    deep = sum(
        count
        for name, count in counts.items()
        if name.startswith("model.visual.deepstack_merger_list.") and name.count(".") == 3
    )
    return counts["model.visual"] - merger - deep, merger + deep


def close(counted: float, expected: float) -> bool:
    return abs(counted - expected) <= 0.01 * expected


@contextmanager
def vision_outside(family: str, model: Any, batch: Any) -> Iterator[None]:
    """Makes the vision features of LLaVA-NeXT outside the trace: transformers unpads its tiles by sizes that PyTorch's
    tracer turns into tensors, with or without a recipe."""
    if family != "llava_next":
        yield
        return
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"])
    model.model.get_image_features = lambda *args, **kwargs: features
    try:
        yield
    finally:
        del model.model.get_image_features


@pytest.mark.in_turn(4)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fvcore_counts_the_same_in_each_layer_of_an_attached_model(family: str, recipe: str | None) -> None:
    """In a trace of the whole model, stages included: fvcore counts them in the language model, beside its layers."""
    model, batch, told = prompt(family)
    budget = {} if recipe is None else {"keep": 0.4}
    cost = tp.ledger(model, recipe or "none", **told, **budget).reduced
    with vision_outside(family, model, batch), tp.attach(model, recipe or "none", **budget):
        counts = fvcore_counts(model, batch, use_cache=False, logits_to_keep=1)
    layers = [counts[f"model.language_model.layers.{row.layer}"] for row in cost.rows]
    assert all(close(counted, row.total) for counted, row in zip(layers, cost.rows, strict=True))
    own = counts["model.language_model"] - sum(layers)
    assert 0.9 * cost.method <= own <= cost.method  # it counts a product that is broadcast once, and no eigenvalues


RANK: dict[str, Any] = {"type": "rank_ratio", "scale": 0.5, "energy": 0.9}
EVEN: dict[str, Any] = {"sampler": "uniform", "scorer": "attention", "positions": "renumber"}
ADAPTIVE: dict[str, Any] = {"raters": "all_text", "scorer": "norm", "scheduler": RANK, "recycler": "cluster"}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("parts", [{"scorer": "attention"}, EVEN, ADAPTIVE])
def test_a_trace_of_an_attached_model_gives_its_logits(family: str, parts: dict[str, Any]) -> None:
    """In a batch of ragged rows, with counts that the recipe decides itself: they are part of the trace."""
    stage = {"place": {"before_layer": 1}, "raters": "all_text", "scheduler": {"type": "fixed", "keep": 0.4}, **parts}
    model = build(family, layers=3)
    batch = inputs(family, model)
    with tp.attach(model, {"version": 1, "stages": [stage]}), torch.no_grad(), torch.jit.optimized_execution(False):
        expected = model(**batch, use_cache=False).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = Traceable(model, list(batch), {"use_cache": False})
            traced = torch.jit.trace(whole, tuple(batch.values()), check_trace=False)
        assert torch.allclose(traced(*batch.values()), expected, atol=1e-5)


# transformers unpads the tiles of LLaVA-NeXT by sizes that PyTorch's tracer turns into tensors.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava_next"])
def test_fvcore_counts_the_same_in_a_whole_model(family: str) -> None:
    """It counts what the result depends on: not the last layer of LLaVA's tower, which runs for nothing."""
    model, batch, told = prompt(family)
    cost = tp.ledger(model, "none", **told).untouched
    counts = fvcore_counts(model, batch, use_cache=False, logits_to_keep=1)
    for row in cost.rows:
        assert close(counts[f"model.language_model.layers.{row.layer}"], row.total)
    assert close(counts["lm_head"], cost.lm_head)
    if family == "llava":
        vision = model_shape(model).vision
        useful = replace(vision, layers=vision.layers - vision.unused).tower(told["tokens"], told["grids"])
        assert vision.unused == 1
        assert close(counts["model.vision_tower"], useful)
        assert useful < 0.8 * cost.vision_tower
    else:
        assert close(counts["model.visual"], cost.vision_tower + cost.projector)
