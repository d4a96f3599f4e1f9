"""The ledger's closed form against two counters that watch the real modules run, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, sizes, vision_mask
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tokenprune as tp
from tokenprune.cost.account import Ledger
from tokenprune.families.shape import model_shape
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.work import Work

RECIPES = [None, "sparsevlm-v1.5", "fastv", "feather", "sparsevlm-plus", "pyramiddrop-code"]


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cdist(x: Any, y: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * y[1] * x[2]


def _eigenvalues(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Reduction to tridiagonal form, 4/3 n³ operations; what comes after it, and is left out, goes with n²."""
    return int(2 * (2 * x[-1] ** 3 // 3))


# PyTorch counts 0 for the fused attention of CPUs (pytorch/pytorch#195460), and no distances and eigenvalues.
MISSING = {
    torch.ops.aten._linalg_eigh: _eigenvalues,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._cdist_forward: _cdist,
}


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


def executed(model: Any, batch: Any) -> dict[str, int]:
    """Multiply-adds by module: PyTorch counts two operations each."""
    with FlopCounterMode(depth=None, display=False, custom_mapping=MISSING) as counter, torch.no_grad():
        model(**batch, logits_to_keep=1)
    counts = {"all": int(counter.get_total_flops()) // 2}
    for name, operations in counter.get_flop_counts().items():
        total = sum(operations.values())
        assert total % 2 == 0
        counts[name.partition(".")[2]] = total // 2
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_counts_the_same(family: str, recipe: str | None) -> None:
    """To the last multiply-add. A stage runs in the hook of its layer, so PyTorch counts it there."""
    model, batch, told = prompt(family)
    budget = {} if recipe is None else {"keep": 0.4}
    ledger: Ledger = tp.ledger(model, recipe or "none", **told, **budget)
    if recipe is None:
        counts = executed(model, batch)
    else:
        with tp.attach(model, recipe, keep=0.4) as attached:
            counts = executed(model, batch)
        assert attached.report.vision_tokens[0].tolist() == [row.vision for row in ledger.reduced.rows]
    for row in ledger.reduced.rows:
        method = sum(stage.total for stage in ledger.reduced.stages if stage.layer == row.layer)
        assert counts[f"model.language_model.layers.{row.layer}"] == row.total + method
    assert counts["lm_head"] == ledger.reduced.lm_head
    tower, projector = vision_counts(family, counts)
    assert (tower, projector) == (ledger.reduced.vision_tower, ledger.reduced.projector)
    assert bool(ledger.reduced.method) == (recipe is not None)


@pytest.mark.parametrize("share", [0.75, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_flops_is_what_torch_counts(family: str, share: float) -> None:
    """The whole prefill stays within the share, and the ledger knows it to the last multiply-add."""
    model, batch, told = prompt(family)
    untouched = executed(model, batch)["all"]
    ledger: Ledger = tp.ledger(model, "pyramiddrop-code", **told, flops=share)
    with tp.attach(model, "pyramiddrop-code", flops=share):
        reduced = executed(model, batch)["all"]
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
        counts = executed(model, batch)
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


class Tensors(nn.Module):
    """A module that takes tensors in order, which is what fvcore traces; other arguments are fixed."""

    def __init__(self, module: Any, names: list[str], **fixed: Any) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.fixed = fixed

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.module(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        return out.logits if hasattr(out, "logits") else out


def _sdpa_handle(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return int(q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


def traced(module: Any, tensors: dict[str, torch.Tensor], **fixed: Any) -> FlopCountAnalysis:
    """fvcore's multiply-adds. It knows no fused attention and counts layer norms, until it is told otherwise."""
    analysis = FlopCountAnalysis(Tensors(module, list(tensors), **fixed), tuple(tensors.values()))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_handle)
    analysis.set_op_handle("aten::layer_norm", _nothing)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def close(counted: float, expected: float) -> bool:
    return abs(counted - expected) <= 0.01 * expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [None, "sparsevlm-v1.5", "fastv"])
def test_fvcore_counts_the_same_in_each_layer(family: str, recipe: str | None) -> None:
    """On what each layer really gets. PyTorch's tracer stumbles over the stages themselves (scatter of a bool)."""
    model, batch, told = prompt(family)
    ledger: Ledger = tp.ledger(model, recipe or "none", **told, **({} if recipe is None else {"keep": 0.4}))
    given: dict[int, dict[str, Any]] = {}
    with tp.attach(model, recipe or "none", **({} if recipe is None else {"keep": 0.4})):
        for index, layer in enumerate(model.model.language_model.layers):

            def note(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                given[index] = {"hidden_states": args[0], **kwargs} if args else kwargs

            layer.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(**batch, use_cache=False)
    assert [given[row.layer]["hidden_states"].shape[1] for row in ledger.reduced.rows] == [
        row.tokens for row in ledger.reduced.rows
    ]
    for row in ledger.reduced.rows:
        fixed = dict(given[row.layer])
        hidden = fixed.pop("hidden_states")
        layer = model.model.language_model.layers[row.layer]
        layer._forward_pre_hooks.clear()
        assert close(traced(layer, {"hidden_states": hidden}, **fixed).total(), row.total)


# transformers unpads the tiles of LLaVA-NeXT by sizes that PyTorch's tracer turns into tensors.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava_next"])
def test_fvcore_counts_the_same_in_a_whole_model(family: str) -> None:
    """It counts what the result depends on: not the last layer of LLaVA's tower, which runs for nothing."""
    model, batch, told = prompt(family)
    cost = tp.ledger(model, "none", **told).untouched
    counts = traced(model, dict(batch), use_cache=False, logits_to_keep=1).by_module()
    for row in cost.rows:
        assert close(counts[f"module.model.language_model.layers.{row.layer}"], row.total)
    assert close(counts["module.lm_head"], cost.lm_head)
    if family == "llava":
        vision = model_shape(model).vision
        useful = replace(vision, layers=vision.layers - vision.unused).tower(told["tokens"], told["grids"])
        assert vision.unused == 1
        assert close(counts["module.model.vision_tower"], useful)
        assert useful < 0.8 * cost.vision_tower
    else:
        assert close(counts["module.model.visual"], cost.vision_tower + cost.projector)
