"""The ledger's closed form against two counters that watch the real modules run, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, sizes, vision_mask
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tokenprune as tp
from tokenprune.flops.ledger import Ledger
from tokenprune.models.shape import model_shape

RECIPES = [None, "sparsevlm-v1.5", "fastv", "feather", "sparsevlm-plus", "pyramiddrop-code"]


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cdist(x: Any, y: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * y[1] * x[2]


# PyTorch counts 0 for the fused attention of CPUs (pytorch/pytorch#195460), and no distances.
MISSING = {
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
    counts: dict[str, int] = {}
    for name, operations in counter.get_flop_counts().items():
        total = sum(operations.values())
        assert total % 2 == 0
        counts[name.partition(".")[2]] = total // 2
    return counts


def close(counted: float, expected: float) -> bool:
    return abs(counted - expected) <= 0.01 * expected


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
    """A model that takes tensors in order, which is what fvcore traces."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        logits: torch.Tensor = self.model(**given, use_cache=False, logits_to_keep=1).logits
        return logits


def _sdpa_handle(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return int(q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [None, "sparsevlm-v1.5", "fastv"])
def test_fvcore_counts_the_same(family: str, recipe: str | None) -> None:
    """Within 1 % per layer: fvcore knows no fused attention, and counts norms, until it is told otherwise.

    It counts what the result depends on: not the last layer of LLaVA's tower, which runs for nothing.
    """
    model, batch, told = prompt(family)
    ledger: Ledger = tp.ledger(model, recipe or "none", **told, **({} if recipe is None else {"keep": 0.4}))
    attached = None if recipe is None else tp.attach(model, recipe, keep=0.4)
    try:
        analysis = FlopCountAnalysis(Tensors(model, list(batch)), tuple(batch.values()))
        analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_handle)
        analysis.set_op_handle("aten::layer_norm", _nothing)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = analysis.by_module()
    finally:
        if attached is not None:
            attached.detach()
    for row in ledger.reduced.rows:
        assert close(counts[f"model.model.language_model.layers.{row.layer}"], row.total)
    if family.startswith("llava"):
        vision = model_shape(model).vision
        seen = (ledger.reduced.vision_tower - tower_of_nothing(model, told)) / ledger.reduced.vision_tower
        assert vision.unused == 1
        assert close(counts["model.model.vision_tower"], seen * ledger.reduced.vision_tower)


def tower_of_nothing(model: Any, told: dict[str, Any]) -> int:
    """What the tower's unused layers cost."""
    from dataclasses import replace

    vision = model_shape(model).vision
    shorter = replace(vision, layers=vision.layers - vision.unused)
    return vision.tower(told["tokens"], told["grids"]) - shorter.tower(told["tokens"], told["grids"])
