"""`verify`: the ledger beside two counters that watch a small model of the same shape run, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.grids import Grid
from tokenprune.cost.account import Cost, account, readable
from tokenprune.engine.attach import Attached, attach
from tokenprune.families.noise import Pictures, any_resolution, noise
from tokenprune.families.shape import model_shape
from tokenprune.families.sketch import sketch_config, sketch_model
from tokenprune.recipe import Recipe
from tokenprune.study.counters import fvcore_counts, torch_counts

Counts = dict[str, int]
"""Multiply-adds by the name of a module; of all of it by ``""``."""
Notes = tuple[str, ...]

WIDE = 512
"""A decoder that is wider than this is counted on a narrower one."""
CLOSE = 0.01
"""By what share fvcore may differ from the ledger in a piece."""


@dataclass(frozen=True)
class Piece:
    """One piece of the prefill as the ledger and the counters see it, in multiply-adds."""

    name: str
    ledger: int
    torch: int
    """PyTorch's `FlopCounterMode`, where attention runs in matrix products."""
    torch_sdpa: int
    """The same where attention runs in one fused operation, which PyTorch does not count on a CPU."""
    fvcore: int | None = None
    traced: int | None = None
    """What the ledger counts of what a trace shows, so that fvcore should; None where that is not known."""
    stated: bool = True
    """Whether every part in it states what it costs."""

    @property
    def agrees(self) -> bool:
        """PyTorch to the last multiply-add, fvcore within `CLOSE`; as far as the ledger knows the piece."""
        if self.fvcore is not None and self.traced is not None and abs(self.fvcore - self.traced) > CLOSE * self.traced:
            return False
        return self.torch == self.ledger or not self.stated


@dataclass(frozen=True)
class Verification:
    """What the counters say on one model."""

    model: str
    width: int
    """Of the decoder that ran."""
    full_width: int
    """Of the one that was named."""
    pieces: tuple[Piece, ...]
    notes: Notes
    """What the counters leave out."""

    @property
    def agrees(self) -> bool:
        """Whether every piece does."""
        return all(piece.agrees for piece in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        pieces = [{**vars(piece), "agrees": piece.agrees} for piece in self.pieces]
        return {**vars(self), "agrees": self.agrees, "pieces": pieces, "notes": list(self.notes)}


def verify(
    name: str, recipe: Recipe, *, grids: Sequence[Grid] | None = None, text: int = 64, question: int | None = None
) -> Verification:
    """Run `recipe` on a small model of random weights, and hold two counters against the ledger.

    The model has the depth, the head size and the prompt of the one that is named, and its width where that is at most
    `WIDE`; else two heads' width. Counts follow from shapes, not from what a model has learned.

    Args:
        name: as in `tokenprune.families.sketch.sketch_config`.
        recipe: with its budget.
        grids: of one picture, in vision tokens; the model's usual one when left out.
        text: other tokens of the prompt.
        question: of these, the ones behind the picture; all of them when left out.

    Raises:
        InputError: no such model, too few words, or fvcore is not installed.
        UnsupportedModelError: a family that nobody makes pictures of noise for.
    """
    config = sketch_config(name)
    full, shape = config.get_text_config().hidden_size, model_shape(config)
    if full > WIDE:
        config = sketch_config(name, width=2 * shape.decoder.head_dim)
        shape = model_shape(config, name=shape.name)
    usual = shape.vision.usual()
    grids = usual if grids is None else tuple(grids)
    model = sketch_model(config, dtype=torch.float32, device=torch.device("cpu"), attention="eager")
    inputs = _prompt(model, grids, text=text, behind=text if question is None else question)
    sized: AbstractContextManager[None] = nullcontext() if grids == usual else any_resolution(model)
    with sized, attach(model, recipe) as attached:
        by_torch = torch_counts(model, inputs)
        kept = [int((stage.kept >= 0).sum()) for stage in attached.report.stages]
        by_fvcore = fvcore_counts(model, inputs, use_cache=False, logits_to_keep=1)
        model.set_attn_implementation("sdpa")
        by_sdpa = torch_counts(model, inputs, fused=False)
    vision = shape.vision if grids == usual else shape.vision.resized()
    total = attached.report.total[0]
    told = account(
        replace(shape, vision=vision),
        attached.engine.pipeline,
        total=total,
        grids=grids,
        text=text,
        question=question,
        kept=kept,
    ).reduced
    useful = replace(vision, layers=vision.layers - vision.unused)
    traced = useful.tower(total, grids) + useful.projection(total, grids)
    return Verification(
        model=name,
        width=shape.decoder.width,
        full_width=full,
        pieces=_pieces(attached, told, traced, by_torch, by_sdpa, by_fvcore),
        notes=_notes(attached, told, vision.unused, by_torch, by_sdpa, by_fvcore),
    )


def _prompt(model: Any, grids: Sequence[Grid], *, text: int, behind: int) -> dict[str, Tensor]:
    """Noise with so many of its words behind the picture. `noise` puts four before it."""
    inputs = noise(model, Pictures(tuple(grids)), text=text, batch=1)
    length = inputs["input_ids"].shape
    turned = {name: x.roll(text - behind - 4, dims=1) for name, x in inputs.items() if x.shape == length}
    return {**inputs, **turned}


def _pieces(
    attached: Attached, told: Cost, useful: int, by_torch: Counts, by_sdpa: Counts, by_fvcore: Counts
) -> tuple[Piece, ...]:
    """Vision, decoder layers and what the stages before them do, lm_head, and all of it.

    Args:
        attached: the recipe that ran.
        told: the ledger.
        useful: of the vision tower and the projector, what the result depends on.
        by_torch: counts by module, as `by_sdpa` and `by_fvcore`.
    """
    parts = attached.anatomy
    names = {id(module): name for name, module in parts.model.named_modules()}

    def torch_in(modules: Iterable[nn.Module]) -> tuple[int, int]:
        found = [names[id(module)] for module in modules]
        return sum(by_torch.get(name, 0) for name in found), sum(by_sdpa.get(name, 0) for name in found)

    vision = parts.adapter.vision_modules(parts.base)
    seen = sum(by_fvcore.get(names[id(module)], 0) for module in vision)
    cost = told.vision_tower + told.projector
    pieces = [Piece("vision tower and projector", cost, *torch_in(vision), seen, useful)]
    for row, layer in zip(told.rows, parts.layers, strict=True):
        stages = [stage for stage in told.stages if stage.layer == row.layer]
        both, own = torch_in([layer]), torch_in(layer.children())
        if stages:
            pieces.append(
                Piece(
                    "stage " + ", ".join(stage.name for stage in stages),
                    sum(stage.total for stage in stages),
                    both[0] - own[0],
                    both[1] - own[1],
                    stated=not any(stage.unstated for stage in stages),
                )
            )
        pieces.append(Piece(f"layer {row.layer}", row.total, *own, by_fvcore[names[id(layer)]], row.total))
    head: Any = parts.model
    head = head.get_output_embeddings()
    pieces.append(Piece("lm_head", told.lm_head, *torch_in([head]), by_fvcore[names[id(head)]], told.lm_head))
    stated = not told.unstated
    pieces.append(Piece("prefill", told.prefill, by_torch[""], by_sdpa[""], by_fvcore[""], stated=stated))
    return tuple(pieces)


def _notes(attached: Attached, told: Cost, unused: int, by_torch: Counts, by_sdpa: Counts, by_fvcore: Counts) -> Notes:
    parts = attached.anatomy
    names = {id(module): name for name, module in parts.model.named_modules()}
    hidden = by_torch[""] - by_sdpa[""]
    notes = [
        f"PyTorch counts 0 for fused attention (SDPA) on a CPU: {readable(hidden)} of the prefill. So it counts with "
        "eager attention here, and what it would say of SDPA stands beside it"
    ]
    if unused:
        notes.append(
            f"fvcore sees what the result depends on: not the last {unused} layer(s) of the vision tower, which run "
            "but are not read"
        )
    if told.stages:
        own = by_fvcore[names[id(parts.text)]] - sum(by_fvcore[names[id(layer)]] for layer in parts.layers)
        notes.append(
            f"fvcore sees all stages as one, {readable(own)}; it counts a product that is broadcast once, and no "
            "distances and eigenvalues"
        )
    if told.unstated:
        notes.append(f"the ledger does not know what {', '.join(told.unstated)} costs (Part.multiply_adds)")
    return tuple(notes)
