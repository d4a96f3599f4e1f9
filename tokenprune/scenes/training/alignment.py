"""Targets of the alignment phase: a label of each vision token from the scene, and a vector that says it in words.

A vision token on a red circle is taught to lie near "red" + "circle" + its size, so that comparing text tokens with
vision tokens (as SparseVLM's raters do) means something, as it does in a VLM that went through an alignment stage.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.scenes.training.sequences import IGNORE
from tokenprune.scenes.world.boxes import BINS, bin_of
from tokenprune.scenes.world.generate import CELLS, COLOURS, GROUNDS, SHAPES, SIZES, UNITS, Scene, owners
from tokenprune.scenes.world.plates import CODE_LENGTH, LETTERS, Plate, glyph_places
from tokenprune.scenes.world.vocabulary import GRID, token_ids

WORD_FIELDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "ground": GROUNDS,
    "letter": LETTERS,
}
EDGES = ("left", "top", "right", "bottom")
PLACE_FIELDS = {"row": CELLS, "column": CELLS, "centre": 1, "slot": CODE_LENGTH, **dict.fromkeys(EDGES, BINS)}
FIELDS = {**{name: len(values) for name, values in WORD_FIELDS.items()}, **PLACE_FIELDS}
"""Label field -> number of classes; class 0 is "none" in every field, in addition to these."""
SUMMARY_FIELDS = ("colour", "shape", "ground")
"""Label fields that the class token must tell of the whole picture. Untrained, its attention would be noise, and some
scorers read it."""
_COLUMN = {name: number for number, name in enumerate(FIELDS)}


def vision_labels(scene: Scene) -> NDArray[np.int64]:
    """Labels of a scene's vision tokens `[144, 13]`, in the order of `FIELDS`; -100 where one shows nothing clear."""
    owner = rearrange(owners(scene, GRID), "row column -> (row column)")
    table = np.zeros((len(scene.objects) + 1, len(FIELDS)), np.int64)
    table[0, _COLUMN["ground"]] = GROUNDS.index(scene.ground) + 1
    colours, sizes = list(COLOURS), list(SIZES)
    for number, thing in enumerate(scene.objects, start=1):
        values = {
            "colour": colours.index(thing.colour) + 1,
            "shape": SHAPES.index(thing.shape) + 1,
            "size": sizes.index(thing.size) + 1,
            "row": thing.row,
            "column": thing.column,
            **{edge: bin_of(place) + 1 for edge, place in zip(EDGES, thing.box, strict=True)},
        }
        for name, value in values.items():
            table[number, _COLUMN[name]] = value
    labels = table[np.maximum(owner, 0)]
    span = UNITS // GRID
    for thing in scene.objects:
        labels[int(thing.y // span) * GRID + int(thing.x // span), _COLUMN["centre"]] = 1
    labels[owner < 0] = IGNORE
    if scene.plate is not None:
        _label_plate(labels, scene.plate)
    return labels


def _label_plate(labels: NDArray[np.int64], plate: Plate) -> None:
    """Overwrite the labels of vision tokens on the plate: they show a letter and its slot, or nothing."""
    letter, on_plate = (rearrange(each, "row column -> (row column)") for each in glyph_places(plate, GRID))
    labels[(on_plate < 0) & (labels[:, _COLUMN["ground"]] > 0)] = IGNORE
    labels[on_plate > 0] = 0
    labels[letter < 0] = IGNORE
    for slot, name in enumerate(plate.code, start=1):
        labels[letter == slot] = 0
        labels[letter == slot, _COLUMN["letter"]] = LETTERS.index(name) + 1
        labels[letter == slot, _COLUMN["slot"]] = slot


class Teacher(nn.Module):
    """Modules that only the training needs: codes for places, and linear heads on ViT output. None is shipped."""

    def __init__(self, *, width: int, vision_width: int) -> None:
        super().__init__()
        ids = token_ids()
        for name, values in WORD_FIELDS.items():
            self.register_buffer(f"words_{name}", torch.tensor([ids[value] for value in values]), persistent=False)
        for name, count in PLACE_FIELDS.items():
            self.register_buffer(f"code_{name}", 0.7 * torch.randn(count, width))
        self.dense = nn.Linear(vision_width, sum(n + 1 for n in FIELDS.values()))
        self.summary = nn.Linear(vision_width, sum(FIELDS[name] for name in SUMMARY_FIELDS))

    def targets(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """Target of each vision token `[..., width]`: the sum of the codes of its labels `[..., 13]`."""
        total = torch.zeros(*labels.shape[:-1], embedding.shape[1], device=embedding.device)
        for field, name in enumerate(FIELDS):
            words = name in WORD_FIELDS
            codes = embedding[getattr(self, f"words_{name}")] if words else getattr(self, f"code_{name}")
            table = torch.cat([torch.zeros_like(codes[:1]), codes])
            total = total + table[labels[..., field].clamp(min=0)]
        return total

    def losses(
        self, features: Tensor, vision: Tensor, labels: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dense, summary and alignment loss.

        `features [B, 1 + N, vision width]` ViT output, `vision [B, N, width]` projected, `labels [B, N, 13]`.
        """
        logits = self.dense(features[:, 1:])
        weight = torch.where(labels[..., _COLUMN["ground"]] > 0, 0.25, 1.0) * (labels[..., 0] != IGNORE)
        weight = weight / weight.sum()
        dense = torch.zeros((), device=vision.device)
        start = 0
        for field, count in enumerate(FIELDS.values()):
            part = logits[..., start : start + count + 1]
            start += count + 1
            flat, wanted = rearrange(part, "b n c -> (b n) c"), rearrange(labels[..., field], "b n -> (b n)")
            loss = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="none")
            dense = dense + (rearrange(loss, "(b n) -> b n", b=len(weight)) * weight).sum()
        target = self.targets(labels, embedding.detach())
        align = ((vision - target).square().mean(-1) * weight).sum()
        present = torch.cat([_present(labels[..., _COLUMN[n]], FIELDS[n]) for n in SUMMARY_FIELDS], dim=-1)
        summary = F.binary_cross_entropy_with_logits(self.summary(features[:, 0]), present)
        return dense, summary, align


def _present(labels: Tensor, count: int) -> Tensor:
    """Which classes occur in `labels [B, N]`: `[B, count]` float."""
    return F.one_hot(labels.clamp(min=0), count + 1)[..., 1:].amax(1).float()
