"""`PictureReducer`: a recipe as a serving engine runs it, on one picture at a time, between tower and language model.

Engines such as vLLM and SGLang size the placeholders of a picture before its tower runs, encode each picture alone and
remember the result by the picture. So they need two functions: how many tokens a picture will have, from its shape
alone, and which. Recipes that cannot be run so are refused here, with the reason. Nothing of transformers is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenprune.budget import survivors
from tokenprune.builder import build
from tokenprune.core.grids import Grid, cells_of
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe
from tokenprune.stage import Positions

Shape = Grid | tuple[int, int] | Sequence[Grid]
"""(T, H, W) or (H, W) of a picture, in vision tokens; or the grids of one that the model is shown more than once:
overview and tiles, as `attach` reports them (`tokenprune.core.grids`)."""


class PictureReducer:
    """The stages of a recipe on single pictures, behind the tower: static counts, and survivors that depend on the
    picture alone.

        reducer = PictureReducer("divprune", depth=28, keep=0.25)
        reducer.kept((1, 24, 24))                        # 144, before anything has run
        hidden, kept = reducer.prune(hidden, (1, 24, 24))  # [144, D] and [144]

    On a prompt of one picture it keeps what `attach` keeps; on a prompt of several, where the recipe says
    ``pictures: apart``. Without, `attach` ranks all their tokens together, which nobody can who sees one at a time.

    Args:
        recipe: a recipe's name, path, dict or `Recipe`.
        depth: decoder layers of the model, for budgets that count layers.
        keep: budget that replaces the recipe's: tokens of a picture, a share (float) or a count (int).
        average: the same, averaged over all layers.
        final: the same, after the last stage.
        signals: names of the tower's signals that the engine records and hands to `prune` (`tokenprune.core.needs`).

    Raises:
        RecipeError: the recipe is not valid, or cannot be run by an engine; the message has the stage and the reason.
        BudgetError: a budget out of range, or more than one.
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any] | Recipe,
        *,
        depth: int | None = None,
        keep: float | None = None,
        average: float | None = None,
        final: float | None = None,
        signals: Collection[str] = (),
    ) -> None:
        self.pipeline = build(recipe, depth=depth, keep=keep, average=average, final=final)
        refuse_question(self.pipeline, asker="serving")
        _refuse_engine(self.pipeline, frozenset(signals))
        self.positions: Positions = positions_of(self.pipeline, asker="serving")
        """Whether survivors keep their ``original`` position ids, or the prompt is to ``renumber``."""
        self.fingerprint = self.pipeline.fingerprint
        """Belongs into the key of whatever is remembered of a picture: two recipes give it other tokens."""

    @property
    def alone(self) -> bool:
        """Whether `attach` reduces each picture of a prompt by itself, too: the recipe says ``pictures: apart``, or has
        no stage. Else the two agree on prompts of one picture."""
        return self.pipeline.apart or not len(self.pipeline)

    def kept(self, grid: Shape) -> int:
        """How many tokens a picture is left with, merged ones included: plain arithmetic on the host.

        Args:
            grid: of the picture.

        Raises:
            BudgetError: the budget cannot be met.
        """
        grids = _grids(grid)
        total = sum(map(math.prod, grids))
        counts = [count for count in self.pipeline.plan(total, grids) if count is not None]
        return survivors(self.pipeline.steps(), counts, total)[-1] if counts else total

    def prune(self, hidden: Tensor, grid: Shape, signals: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The tokens that a picture is left with.

        Args:
            hidden: ``[N, D]`` what enters the language model, in raster order.
            grid: of the picture.
            signals: ``[N, ...]`` each, those that the engine has promised and the recipe reads.

        Returns:
            ``[K, D]``, and ``[K]`` int64: their indices among the N, ascending; of a merged token its anchor's.

        Raises:
            InputError: shapes that do not fit the grid, or a signal that is not there.
        """
        grids = _grids(grid)
        total = sum(map(math.prod, grids))
        if hidden.dim() != 2 or hidden.shape[0] != total:
            of = ", ".join(str(tuple(one)) for one in grids)
            raise InputError(f"serving: expected hidden [{total}, D] of {of}, got {tuple(hidden.shape)}")
        for name, rows in (signals or {}).items():
            if rows.shape[:1] != hidden.shape[:1]:
                raise InputError(f"serving: expected {name} [{hidden.shape[0]}, ...], got {tuple(rows.shape)}")
        self.pipeline.to(hidden.device)
        given = {name: rows[None] for name, rows in (signals or {}).items()}
        tokens = Tokens.from_hidden(hidden[None], grid=(1, 1, total), signals=given)
        tokens = replace(tokens, grids=(grids,), cell=cells_of([grids], total).to(hidden.device))
        if len(self.pipeline):
            tokens = self.pipeline["after_vision"](tokens)
        return tokens.hidden[0], tokens.origin[0]


def refuse_question(pipeline: Pipeline, *, asker: str) -> None:
    """Raise `RecipeError`, opened by `asker`, unless survivors depend on the picture alone, before the language model
    runs, and nothing has to follow them through its layers."""
    budget = pipeline.budget
    if budget is not None and budget.kind == "flops":
        raise RecipeError(
            f"{asker}: {pipeline.name}: a budget flops depends on the length of each prompt, and a picture is encoded "
            "before its prompt; give a budget keep"
        )
    for stage in pipeline:
        if stage.place.in_decoder:
            _refuse(asker, stage, "it acts between layers of the language model; put it after_vision")
        if stage.reads.depends_on_question:
            _refuse(asker, stage, "it is rated by text, and a picture is encoded before its question, once for all")
        if stage.skips:
            _refuse(asker, stage, "its dropped tokens skip feed-forwards, which embeddings cannot say; dropped: leave")
        if stage.rectifier is not None and stage.place.kind != "in_vision":
            _refuse(asker, stage, "its rectifier adds to attention in later layers, which embeddings cannot carry")


def positions_of(pipeline: Pipeline, *, asker: str) -> Positions:
    """What all stages do with position ids; ``original`` without stages.

    Raises:
        RecipeError: they do different things.
    """
    kinds = {stage.positions for stage in pipeline}
    if len(kinds) > 1:
        raise RecipeError(
            f"{asker}: {pipeline.name}: some stages keep original positions and some renumber; expected one for all"
        )
    return kinds.pop() if kinds else "original"


def _refuse_engine(pipeline: Pipeline, signals: frozenset[str]) -> None:
    """Raise `RecipeError` for what only `attach` can give."""
    for stage in pipeline:
        if stage.place.kind != "after_vision":
            _refuse("serving", stage, "an engine's tower runs whole; put it after_vision")
        if missing := sorted(frozenset(stage.reads.tower) - signals):
            given = f"gives {', '.join(sorted(signals))}" if signals else "gives none"
            _refuse("serving", stage, f"it reads {', '.join(missing)} of the tower, and the engine {given}")
        if stage.reads.projector:
            _refuse("serving", stage, "it merges in front of the projector, which the engine does not hand out")
    if not pipeline.static:
        raise RecipeError(
            f"serving: {pipeline.name}: its counts depend on the data, and placeholders are sized before the tower "
            "runs; give it a budget keep, or a scheduler of fixed counts"
        )


def _refuse(asker: str, stage: Any, reason: str) -> None:
    raise RecipeError(f"{asker}: {stage.name} ({stage.place}): {reason}")


def _grids(shape: Shape) -> tuple[Grid, ...]:
    """The grids of a picture, of the kinds that they were given in."""
    several: Any = shape if shape and isinstance(shape[0], Sequence) else [shape]
    return tuple(_three(grid) for grid in several)


def _three(grid: Any) -> Grid:
    sides = tuple(int(side) for side in grid)
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise InputError(f"serving: expected a grid (T, H, W) or (H, W) of vision tokens, got {grid!r}")
    if len(sides) == 2:
        return (1, *sides)
    return grid if isinstance(grid, tuple) else sides  # type: ignore[return-value]
