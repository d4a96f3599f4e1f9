"""What the tests of vision towers share: families, a part that remembers what it read, and the model's own answers.

Nothing here knows a family: attention is that of the tower's own eager kernel, and which patches a vision token is made
of is told by derivatives of the model's own projector.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import MODELS, vision_mask
from torch import Tensor

from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.families.tower import PROVED, Tower
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.recipe import list_recipes, load_recipe
from tokenprune.stage import Stage

TOWERS = tuple(name for name, tiny in MODELS.items() if tiny.config()[1].model_type in PROVED)
"""Models whose tower is read and reduced."""

KINDS = (
    *("internvl", "gemma4", "smolvlm", "mistral3", "lfm2_vl"),
    *(
        pytest.param(family, marks=pytest.mark.slow)  # towers much like these
        for family in ("llava_onevision", "gemma3", "ministral3", "glm4v", "glm_ocr", "paddleocr_vl")
    ),
)
"""Beside `families.FAMILIES`, which every test runs for: one model of every other kind of tower and projector."""

INSIDE = [name for name in list_recipes() if any(s.place.kind == "in_vision" for s in load_recipe(name).stages)]
"""Recipes with stages inside the tower: a budget is that of each picture, and never `flops`."""


class Reading(Scorer):
    """Reads signals and remembers what it got."""

    def __init__(self, *, names: tuple[str, ...] = ("class_attention",)) -> None:
        super().__init__()
        self.names = names
        self.got: dict[str, Tensor] = {}
        self.seen: Tokens | None = None

    @property
    def reads(self) -> Needs:
        return Needs(tower=self.names)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        self.got = {name: tokens.signal(name) for name in self.names}
        self.seen = tokens
        first = self.got[self.names[0]].float()
        return tokens.only_valid(first if first.dim() == 2 else first.flatten(2).sum(-1))


def reading(*names: str, place: Any = "after_vision", keep: float = 0.5) -> Stage:
    return Stage(place=place, scheduler=FixedScheduler(keep=keep), scorer=Reading(names=names), sampler=TopKSampler())


class Weights:
    """Attention matrices of the blocks of a vision tower, from its own eager attention."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.pieces: dict[int, list[Tensor]] = defaultdict(list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        place = {id(attention): index for index, attention in enumerate(self.tower.attentions)}
        module = sys.modules[type(self.tower.attentions[0]).__module__]
        original = module.eager_attention_forward

        def recording(attention: Any, *args: Any, **kwargs: Any) -> Any:
            output, weights = original(attention, *args, **kwargs)
            if id(attention) in place:
                self.pieces[place[id(attention)]].append(weights.float().mean(1))
            return output, weights

        with patch.object(module, "eager_attention_forward", recording):
            yield

    def class_row(self, block: int) -> Tensor:
        """``[patches]``."""
        (matrix,) = self.pieces[block]
        return matrix[:, 0, self.tower.prefix :].flatten()

    def received(self, block: int, batch: Mapping[str, Tensor]) -> Tensor:
        """``[patches]``; a column of the matrix of a whole frame, of which windows are blocks."""
        if (asks := _asks(batch)) is not None:
            (piece,) = self.pieces[block]
            return ((piece * asks[..., None]).sum(1) / asks.sum(1, keepdim=True)).flatten()
        total = torch.cat([piece.sum(1)[:, self.tower.prefix :].flatten() for piece in self.pieces[block]])
        if (frames := self._frames(batch)) is not None:
            return total / torch.tensor([size for size in frames for _ in range(size)])
        return total / self.pieces[block][0].shape[1]

    def _frames(self, batch: Mapping[str, Tensor]) -> list[int] | None:
        """Patches of each frame, where several stand in one sequence."""
        if "image_grid_thw" in batch:
            return [h * w for t, h, w in batch["image_grid_thw"].tolist() for _ in range(t)]
        if self.pieces[0][0].shape[0] == 1 and "image_sizes" in batch:
            patch: Any = self.tower.module.config.patch_size  # type: ignore[union-attr]
            return [h // patch * (w // patch) for h, w in batch["image_sizes"].tolist()]
        return None


def _asks(batch: Mapping[str, Tensor]) -> Tensor | None:
    """``[R, n]`` float, 0 on patches that pad a row; None where nothing does."""
    if "spatial_shapes" in batch:
        return batch["pixel_attention_mask"].float()
    return (batch["image_position_ids"] >= 0).all(-1).float() if "image_position_ids" in batch else None


def makeup(model: Any, tower: Tower, batch: Mapping[str, Tensor]) -> Tensor:
    """``[vision tokens, patches]`` float, rows that sum to 1: which patches each vision token of the prompt is made of.

    Told by which states behind the last block that is read move it, once the model has projected them: so by nothing
    that tokenprune knows. A row of 0 is a token that no patch moves, such as a newline.
    """
    states: list[Tensor] = []
    arrived: list[Tensor] = []

    def cut(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        states.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def arrives(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(args[0] if args else kwargs["hidden_states"])

    handles = [
        # before transformers' own hooks, which record hidden states
        tower.blocks[tower.last].register_forward_hook(cut, prepend=True),
        model.get_decoder().layers[0].register_forward_pre_hook(arrives, with_kwargs=True),
    ]
    with torch.enable_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        (hidden,) = states
        tokens = arrived[0][vision_mask(model, batch["input_ids"])].tanh().sum(-1)
        rows = [torch.autograd.grad(each, hidden, retain_graph=True)[0] for each in tokens if each.requires_grad]
    moved = torch.stack(rows).abs().sum(-1) > 0
    moved = (moved if moved.dim() == 2 else moved[..., tower.prefix :].flatten(1)).float()
    return moved / moved.sum(1, keepdim=True).clamp(min=1)


def by_sample(model: Any, batch: Mapping[str, Tensor], rows: Tensor) -> list[Tensor]:
    """Rows of all vision tokens as those of each sample."""
    return list(rows.split(vision_mask(model, batch["input_ids"]).sum(1).tolist()))
