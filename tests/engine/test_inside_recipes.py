"""Shipped recipes that act inside the vision tower: the masked reference of the tower, told who merged with whom.

The reference runs all patches in all blocks. From a stage's block on nobody sees what it has dropped, masses weigh on
the keys, and targets become what the stage's plan makes of the reference's own states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine.test_plain_towers import KINDS, pixels, plain
from families import FAMILIES, build, inputs, row_inputs, vision_mask
from hidden_patches import hidden_patches
from pruned import TOLERANCE
from reference import Stage as Hidden
from reference import generate_logits, masked_reference
from torch import Tensor
from towers import INSIDE

import tokenprune as tp
from tokenprune.core.merge import merge
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.tower import Tower, find_tower


class Acted:
    """What the stages of a run have done at each block, for a tower that runs all patches."""

    def __init__(self, stages: Any, reduction: Any) -> None:
        self.units = reduction.units
        self.levels: dict[int, list[Any]] = {}
        self.gone: dict[int, Tensor] = {}
        self.bias: dict[int, Tensor] = {}
        for block, numbers in stages.at.items():
            order = sorted(reduction.gone)
            self.levels[block] = [reduction.levels[order.index(number)] for number in numbers]
            self.gone[block], mass = reduction.gone[numbers[-1]].unbind(1)
            if stages.stages[numbers[-1]].rectifier is not None:
                weighed = torch.where(self.gone[block] > 0, 0.0, mass.log())
                self.bias[block] = weighed - sum(self.bias.values(), torch.zeros_like(mass))

    @contextmanager
    def told_to(self, tower: Tower) -> Iterator[None]:
        """The reference merges what it has itself, by the plans of the run."""
        handles = [
            tower.blocks[block].register_forward_pre_hook(self._merges(tower, levels), with_kwargs=True)
            for block, levels in self.levels.items()
        ]
        try:
            with hidden_patches(tower, self.gone, self.bias):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _merges(self, tower: Tower, levels: list[Any]) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            full = (args[0] if args else kwargs["hidden_states"]).clone()
            front = full[:, : tower.prefix] if full.dim() == 3 else full[:0]
            patches = full.clone() if full.dim() == 2 else full[:, tower.prefix :].flatten(0, 1)
            for level in levels:
                if level.plan is None:
                    continue
                merged = merge(patches[self.units[level.slot]], level.plan).to(full.dtype)
                target = level.plan.target
                at = level.slot.gather(1, target.clamp(min=0))
                patches[self.units[at[target >= 0]]] = merged[target >= 0]
            full = patches if full.dim() == 2 else torch.cat([front, patches.unflatten(0, (len(full), -1))], 1)
            return ((full, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": full})

        return hook


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_generate_is_that_of_the_masked_reference(name: str, family: str) -> None:
    model, eager = build(family), build(family, attention="eager")
    weighs = any(stage.rectifier is not None for stage in tp.load_recipe(name).stages)
    if weighs and anatomy(model).adapter.tower_parts(model.base_model).order != "raster":
        with pytest.raises(UnsupportedModelError, match="takes no mask, so no bias"):
            tp.attach(model, name)
        return
    batch = inputs(family, model)
    with tp.attach(model, name) as attached:
        model(**batch)
        taps: Any = attached.engine.tower
        acted = Acted(taps.stages, attached.engine.now.tower.runs[0].reduction)
        last, total = attached.report.stages[-1], attached.report.total
        kept, sizes = last.left.clone(), last.sizes
        sequences, logits = generate_logits(model, batch)
        rows = [model(**row_inputs(batch, row)).logits[0, -1] for row in range(2)]
    assert max(sizes) < max(total)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    vision = vision_mask(eager, batch["input_ids"])
    with masked_reference(eager, vision, [Hidden(0, kept)]), acted.told_to(tower):
        expected, reference = generate_logits(eager, batch)
    assert torch.equal(sequences, expected)
    assert max((a - b).abs().max().item() for a, b in zip(logits, reference, strict=True)) < TOLERANCE
    assert max((logits[0][row] - rows[row]).abs().max().item() for row in range(2)) < TOLERANCE
    # and what the stages wrote and hid matters
    with masked_reference(eager, vision, [Hidden(0, kept)]):
        _, without = generate_logits(eager, batch)
    assert (logits[0] - without[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_a_plain_tower_is_restored(name: str, kind: str) -> None:
    """Every patch has a state: those that are left that of the reference, the others what their target has become."""
    model, eager = (getattr(m, "base_model", m) for m in (plain(kind), plain(kind, "eager")))
    untouched = model(pixels(kind)).last_hidden_state
    with tp.attach_vision(model, name) as attached:
        reduced = model(pixels(kind)).last_hidden_state
        reduction: Any = attached._run.reduction  # type: ignore[union-attr]
    assert torch.equal(model(pixels(kind)).last_hidden_state, untouched)
    tower, acted = find_tower(eager), Acted(attached._stages, reduction)
    with acted.told_to(tower):
        expected = eager(pixels(kind)).last_hidden_state
    left = reduction.gone[max(reduction.gone)][:, 0].view(len(reduced), -1) == 0
    there = torch.nn.functional.pad(left, (tower.prefix, 0), value=True)
    assert (reduced[there] - expected[there]).abs().max() < TOLERANCE
    patches = reduced[:, tower.prefix :]
    for row, own in enumerate(left):
        states = {tuple(state.tolist()) for state in patches[row, own]}
        assert {tuple(state.tolist()) for state in patches[row]} == states, "a patch that is nobody's"
        assert own.sum() < len(own)
