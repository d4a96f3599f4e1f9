"""`Pipeline`: the stages of a recipe at their places, on plain tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from tokenprune.apart import Alone, Pictures, pictures_alone
from tokenprune.budget import Budget, Prices, Step, Summary, check_share, plan, summary, together
from tokenprune.core.grids import Grid, pictures_of
from tokenprune.core.place import Place
from tokenprune.core.signals import Undeclared, Unreadable
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, InputError, RecipeError, did_you_mean
from tokenprune.pipeline_checks import check_apart, check_inside, check_sizes, check_skipping
from tokenprune.stage import Stage, StageResult

Key = str | int | Place
"""``"after_vision"``, ``"before_layer: 3"``, ``"in_vision: block 6"``, 3, or a `Place`."""

PricesOf = Callable[["Pipeline", int, Sequence[Grid], int, int], Prices]
"""What a prompt costs on some model: from a pipeline, vision tokens, grids, other tokens, and those that may rate."""


class Pipeline(nn.Module):
    """Stages in the order in which they act, and the budget that they share.

        tokens ─▶ pipeline["after_vision"] ─▶ layers 0 … 2 ─▶ pipeline[3] ─▶ layers 3 … ─▶

    It holds no state between calls. In a user's own model it is called once per place; the engine under
    `tokenprune.engine` asks for `plan` and runs the stages itself. Position ids in `Tokens` are always the original
    ones: whoever holds the whole sequence, text included, applies ``positions: renumber``.

    Stages, budget and depth are fixed when it is built: plans are remembered.

    Args:
        stages: in order.
        budget: for all stages together; None leaves the counts to the schedulers.
        depth: decoder layers of the model, where a place is a share of the depth or the budget is an average.
        name: how messages call it.
        prices: of prompts on the model, for a budget ``flops``; `attach` gives them.
        pictures: whether the pictures of a prompt are reduced ``together``, or each as if it were alone (``apart``).

    Raises:
        RecipeError: the stages do not fit the depth, or cannot take pictures apart.
        BudgetError: they cannot meet the budget, whatever the picture, or stages inside the vision tower take no such
            budget.
    """

    stages: Sequence[Stage]

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        budget: Budget | None = None,
        depth: int | None = None,
        name: str = "pipeline",
        prices: PricesOf | None = None,
        pictures: Pictures = "together",
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)  # type: ignore[assignment]
        self.budget = budget
        self.depth = depth
        self.name = name
        self.prices = prices
        self.pictures: Pictures = pictures
        self._plans: dict[tuple[object, ...], tuple[int | None, ...]] = {}
        check_apart(name, stages, pictures, counted=self.static and not self._priced)
        check_inside(name, stages, budget)
        check_skipping(name, stages, pictures)
        if depth is not None:
            check_share(self.steps(depth), budget, depth=depth)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def static(self) -> bool:
        """Whether every count is known from shapes alone, before any layer runs.

        Also those of groups: which tokens of a group an earlier stage has left is known on the device alone.
        """
        groupers = [stage.grouper for stage in self.stages]
        if any(grouper is not None and (index or not grouper.static) for index, grouper in enumerate(groupers)):
            return False
        return self.budget is not None or all(stage.scheduler.static for stage in self)

    @property
    def apart(self) -> bool:
        """Whether it does anything, and to each picture of a prompt by itself."""
        return self.pictures == "apart" and len(self) > 0

    @property
    def reads_grids(self) -> bool:
        """Whether a part declares that it reads where tokens lie on the pictures, or a budget ``flops`` counts them, or
        pictures are taken apart."""
        return self._priced or self.apart or any(stage.reads.grid for stage in self)

    @property
    def _priced(self) -> bool:
        return self.budget is not None and self.budget.kind == "flops"

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits for its stages and budget: places, settings, and the weights that parts hold."""
        made = sha256(f"{self!r} {self.budget}{' apart' if self.apart else ''}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return made.hexdigest()[:12]

    def layers(self, depth: int | None = None) -> tuple[int, ...]:
        """The 0-based layer before which each stage acts in a model of `depth` layers (0 for ``after_vision``)."""
        return tuple(step.layer for step in self.steps(depth))

    def steps(self, depth: int | None = None) -> tuple[Step, ...]:
        """The stages as `tokenprune.budget` sees them.

        Raises:
            RecipeError: in a model of this depth a stage has no place, or they are not in order.
        """
        depth = self._depth(depth)
        steps = tuple(
            Step(stage.place.layer(depth), stage.scheduler, stage.recycler, stage.scheduler.empties) for stage in self
        )
        layers = [step.layer for step in steps]
        if layers != sorted(layers) or max(layers, default=0) >= depth:
            raise RecipeError(f"{self.name}: does not fit a model of {depth} layers: it acts before layers {layers}")
        for before, stage in pairwise(self.stages):
            if stage.place.precedes(before.place):
                raise RecipeError(f"{self.name}: {stage.place} comes before {before.place}: put the stages in order")
        return steps

    # In a compiled model a plan is a constant: one graph a shape, and the solver is not traced.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def plan(
        self,
        total: int,
        grids: Sequence[Grid],
        depth: int | None = None,
        *,
        text: int | None = None,
        question: int | None = None,
    ) -> tuple[int | None, ...]:
        """How many tokens each stage keeps of a sample, before recycling; None where only the data can tell.

        Plain arithmetic on the host, worked out once for every distinct question.

        Args:
            total: original vision tokens of the sample.
            grids: (T, H, W) of each of its images.
            depth: decoder layers of the model; as given to the pipeline when left out.
            text: other tokens of the prompt; only a budget ``flops`` asks for them.
            question: of these, the ones behind the first image, which may rate; all of them when left out.

        Raises:
            BudgetError: the budget cannot be met.
            InputError: the depth is needed and not known; or model and text, for a budget ``flops``.
        """
        depth = self._depth(depth)
        if not self._priced:
            text = question = None  # they change nothing: one plan for all prompts
        elif self.budget is not None and self.budget.value >= 1.0:
            return (total,) * len(self)  # whatever the prompt costs
        counted: Any = grids
        if not any(stage.scheduler.reads.grid for stage in self):
            counted = Undeclared(f"a scheduler of {self.name}", "the grids of the pictures", "grid=True")
        told = self.reads_grids and not isinstance(grids, Unreadable)  # unknown grids raise where they are needed
        asked = (total, tuple(grids) if told else (), depth, text, question)
        if self.apart and total and asked not in self._plans and len(alone := pictures_of(grids)) > 1:
            each = [self.plan(sum(map(math.prod, own)), own, depth) for own in alone]
            self._plans[asked] = tuple(sum(cast("Sequence[int]", counts)) for counts in zip(*each, strict=True))
        if asked not in self._plans:
            prices = self._prices(total, grids, text, question)
            self._plans[asked] = plan(
                self.steps(depth), self.budget, depth=depth, total=total, grids=counted, prices=prices
            )
        return self._plans[asked]

    def picture_plan(self, grid: Grid) -> tuple[int | None, ...]:
        """How many tokens each stage inside the vision tower keeps of one picture; None where only the data can tell.

        The tower sees pictures, and tiles of them, before anybody knows whose they are and what is asked about them. So
        a share is one of each picture, and a count is that of the only one (`check_pictures`). All that is left of it
        goes through every layer behind: `keep`, `average` and `final` are the same.

        Args:
            grid: (T, H, W) of the picture, or tile, in what will be vision tokens.
        """
        asked = ("picture", grid)
        if asked not in self._plans:
            inside = [stage for stage in self if stage.place.kind == "in_vision"]
            own = [Step(0, stage.scheduler, stage.recycler, stage.scheduler.empties) for stage in inside]
            self._plans[asked] = plan(own, self.budget, depth=1, total=math.prod(grid), grids=(grid,))
        return self._plans[asked]

    def check_pictures(self, pictures: int, samples: int) -> None:
        """Raise `BudgetError` where a budget is a count and stages inside the tower had more `pictures` than `samples`.

        Args:
            pictures: what the tower has seen, tiles and frames that it takes one by one among them.
            samples: those that have pictures.
        """
        inside = any(stage.place.kind == "in_vision" for stage in self)
        if inside and self.budget is not None and not self.budget.is_share and pictures > samples:
            raise BudgetError(
                f"{self.name}: budget {self.budget}: a count is one of all pictures of a prompt, and stages inside the "
                f"vision tower see one at a time, of which there are {pictures} for {samples} prompt"
                f"{'s' * (samples != 1)}; expected a share of each, such as {self.budget.kind}: 0.25"
            )

    def alone(
        self, totals: Sequence[int], grids: Sequence[Sequence[Grid]], depth: int | None = None
    ) -> tuple[tuple[Alone, ...], ...]:
        """For each stage, all pictures of a batch as they come to it, where pictures are taken `apart`.

        Args:
            totals: original vision tokens of each sample.
            grids: (T, H, W) of the images of each.
            depth: as in `plan`.
        """
        return pictures_alone(self.steps(depth), lambda total, own: self.plan(total, own, depth), totals, grids)

    def summary(self, total: int, grids: Sequence[Grid], depth: int | None = None) -> Summary:
        """The plan for a sample in all meanings of "so many tokens"; arguments as in `plan`.

        Raises:
            InputError: the recipe is adaptive, so that its counts depend on the data.
        """
        depth = self._depth(depth)
        counts = self.plan(total, grids, depth)
        if None in counts:
            raise InputError(
                f"{self.name}: adaptive stages decide their counts from the data; give it a budget to fix them"
            )
        if self.apart and len(alone := pictures_of(grids)) > 1:
            return together([self.summary(sum(map(math.prod, own)), own, depth) for own in alone])
        return summary(self.steps(depth), cast("Sequence[int]", counts), depth, total)

    def run(self, place: Key, tokens: Tokens) -> list[StageResult]:
        """What each stage at `place` made of `tokens`, in order; the last result holds the final `Tokens`.

        Raises:
            InputError: no stage acts at `place`, or the tokens have not been through the places before it.
        """
        here = self._at(place)
        plans = [self.plan(total, grids) for total, grids in zip(tokens.total, tokens.grids, strict=True)]
        results: list[StageResult] = []
        alone = self.alone(tokens.total, tokens.grids) if self.apart else ()
        for index in here:
            pictures = alone[index] if alone else ()
            where = f"{self.name}: stage {index} ({self.stages[index].place})"
            check_sizes(where, self.steps()[:index], tokens, plans, pictures)
            counts = [row[index] for row in plans]
            known = [count for count in counts if count is not None]
            count = tuple(known) if len(known) == len(counts) else None
            stage = self.stages[index]
            if stage.skips:
                raise InputError(
                    f"{where}: dropped: skip_ffn acts inside the layers of a language model: tp.attach does that, and "
                    "tokens alone cannot; expected dropped: leave"
                )
            results.append(stage(tokens, pictures=pictures) if alone else stage(tokens, count))
            tokens = results[-1].tokens
        return results

    def __getitem__(self, place: Key) -> Callable[[Tokens], Tokens]:
        """The stages at `place` as one function: `Tokens` in, `Tokens` out.

        Raises:
            InputError: no stage acts at `place`; the places of this pipeline are listed.
        """
        self._at(place)
        return lambda tokens: self.run(place, tokens)[-1].tokens

    def _depth(self, depth: int | None) -> int:
        """The depth to reckon with: where none is known and none is needed, just enough layers for every place."""
        known = self.depth if depth is None else depth
        if known is not None:
            return known
        places = [stage.place for stage in self]
        layers = [place.at or 0 if place.in_decoder else 0 for place in places]
        kind = None if self.budget is None else self.budget.kind
        needed = kind in ("average", "flops") or any(isinstance(layer, Fraction) for layer in layers)
        if needed or (kind == "keep" and len(set(layers)) > 1):
            raise InputError(f"{self.name} needs the number of decoder layers of the model: build(recipe, depth=32)")
        return 1 + max(map(int, layers), default=0)

    def _prices(self, total: int, grids: Sequence[Grid], text: int | None, question: int | None) -> Prices | None:
        if self.budget is None or self.budget.kind != "flops" or not self.stages or not total:
            return None
        if self.prices is None or text is None:
            raise InputError(
                f"{self.name}: the budget {self.budget} depends on the model and the length of the prompt; tp.attach "
                "solves it for each prompt, and tp.ledger tells the counts, which you may then give as keep"
            )
        return self.prices(self, total, grids, text, text if question is None else question)

    def _names(self, index: int) -> list[str]:
        """What the place of a stage may be called: as the recipe has it, and by its layer where that is known."""
        place = self.stages[index].place
        names = [str(place)]
        if place.in_decoder and self.depth is not None:
            names.append(f"before_layer: {place.layer(self.depth)}")
        return names

    def _at(self, place: Key) -> list[int]:
        """Indices of the stages at `place`."""
        name = f"before_layer: {place}" if isinstance(place, int) else re.sub(r"\s*:\s*", ": ", str(place).strip())
        names = {index: self._names(index) for index in range(len(self))}
        here = [index for index, known in names.items() if name in known]
        if not here:
            known = list(dict.fromkeys(known[-1] for known in names.values()))
            hint = did_you_mean(name, known)
            raise InputError(
                f"{self.name}: no stage acts at {name!r}{hint}; expected one of: {', '.join(known) or 'none'}"
            )
        return here
