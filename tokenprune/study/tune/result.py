"""`Tuned`: what a search tried, the recipe that it found, and how that one does on other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenprune.budget import Budget
from tokenprune.core.files import whole_file
from tokenprune.errors import InputError
from tokenprune.recipe import Recipe
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import SMALLER, ConditionRow, Estimate, Evaluation, Pair
from tokenprune.study.tune.space import Space

WINNER = "tuned"
"""What tables call the recipe that was found."""
GIVEN = "given"
"""What they call the recipe as it was given, where that has the winner's name."""


@dataclass(frozen=True)
class Candidate:
    """One recipe of the space, and how it did on the cases to choose on."""

    number: int
    """0 is the recipe as it was given, at the budget."""
    choices: dict[str, str]
    recipe: Recipe
    right: Estimate
    """Accuracy, or agreement."""
    average: float
    """Vision tokens in a layer, mean over layers and questions."""
    flops_share: float
    """Multiply-adds of the prefill, as a share of the untouched model's."""

    @property
    def label(self) -> str:
        """What was chosen, in a line."""
        return " · ".join(self.choices.values()) or "as given"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "number": self.number,
            "choices": self.choices,
            "fingerprint": self.recipe.fingerprint,
            "right": self.right.to_dict(),
            "average": self.average,
            "flops_share": self.flops_share,
        }


@dataclass(frozen=True)
class Skipped:
    """A combination that cannot run on the model at this budget, and why."""

    choices: dict[str, str]
    reason: str


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`."""

    space: Space
    budget: Budget
    seed: int
    candidates: list[Candidate]
    """In the order in which they were tried."""
    skipped: list[Skipped]
    chosen_on: list[Case]
    report: Evaluation
    """The winner, the recipe as it was given and the baselines, on pictures that nothing was chosen on."""
    method: str
    """How combinations were proposed."""

    @cached_property
    def ranked(self) -> list[Candidate]:
        """Candidates, best first; of equal ones the cheaper one, then the earlier one."""
        return sorted(self.candidates, key=lambda each: (-each.right.value, each.flops_share, each.number))

    @property
    def winner(self) -> Candidate:
        """The best candidate on the cases to choose on."""
        return self.ranked[0]

    @cached_property
    def front(self) -> list[Candidate]:
        """Candidates than which none is both cheaper and better (Pareto), cheapest first."""
        found: list[Candidate] = []
        for each in sorted(self.candidates, key=lambda each: (each.flops_share, -each.right.value, each.number)):
            if not found or each.right.value > found[-1].right.value:
                found.append(each)
        return found

    @cached_property
    def reported(self) -> ConditionRow:
        """The winner's row of the report."""
        return next(row for row in self.report.rows if row.label == WINNER)

    def against(self, label: str) -> Pair:
        """The winner minus another condition of the report, paired.

        Raises:
            InputError: no such condition.
        """
        for pair in self.report.pairs:
            if (pair.first, pair.second) == (WINNER, label):
                return pair
            if (pair.first, pair.second) == (label, WINNER):
                change = Estimate(-pair.change.value, *(_minus(pair.change.high), _minus(pair.change.low)))
                return Pair(pair.budget, WINNER, label, change, pair.p, pair.p_holm)
        raise InputError(f"tune: {label!r} is not in the report")

    @cached_property
    def rival(self) -> ConditionRow:
        """The best of what runs beside the winner; a smaller image only where it saves multiply-adds."""
        others = [row for row in self.report.rows[1:] if row.label != WINNER]
        fair = [row for row in others if row.label != SMALLER or row.flops_share < 0.999]
        return max(fair, key=lambda row: row.overall.value)

    def dump(self, *, model: str = "the model") -> str:
        """The winner as YAML that `load_recipe` reads, under a header that says how it was found."""
        what, report = self.report.measure, self.report
        lines = [
            f"Found by `tokenprune tune` for {model}: the best of {len(self.candidates)} recipes at {self.budget}.",
            f"How: {self.method}; {len(self.skipped)} combinations cannot run here.",
            *(f"  {choice.name}: {' | '.join(choice.values)}" for choice in self.space.choices),
            f"Taken: {self.winner.label}",
            f"Chosen on {_asked(self.chosen_on)}: {what} {_percent(self.winner.right)}. As the best of many,",
            f"that is too much. On {_asked(report.cases)}, others: {_percent(self.reported.overall)}, at "
            f"{self.reported.flops_share:.0%} of the multiply-adds.",
            *(f"  {row.label}: {_percent(row.overall)}" for row in report.rows if row.label != WINNER),
        ]
        head = "".join(f"# {_printable(line)}\n" for line in lines)
        return head + self._winning_recipe().dump()

    def save(self, path: Path, *, model: str = "the model") -> None:
        """Write `dump` to `path`, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with whole_file(path) as file:
                file.write(self.dump(model=model).encode())
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "budget": {self.budget.kind: self.budget.value},
            "seed": self.seed,
            "method": self.method,
            "combinations": self.space.size,
            "choices": {choice.name: list(choice.values) for choice in self.space.choices},
            "chosen_on": {
                "questions": len(self.chosen_on),
                "pictures": sorted({case.picture_id for case in self.chosen_on}),
            },
            "candidates": [each.to_dict() for each in self.candidates],
            "skipped": [{"choices": each.choices, "reason": each.reason} for each in self.skipped],
            "front": [each.number for each in self.front],
            "winner": {**self.winner.to_dict(), "recipe": self._winning_recipe().to_dict()},
            "reported_on": {
                "questions": len(self.report.cases),
                "pictures": sorted({case.picture_id for case in self.report.cases}),
            },
            "report": self.report.to_dict(),
            "versus": [self.against(row.label).to_dict() for row in self.report.rows[1:] if row.label != WINNER],
        }

    def _winning_recipe(self) -> Recipe:
        """The winner without the prose of the recipe that it was made of, which speaks of that one."""
        recipe = self.winner.recipe
        name = recipe.name if not self.winner.choices else f"{recipe.name[:70]}-tuned"
        told = {"name": name, "summary": f"Tuned at {self.budget}", "paper": None, "differences": ()}
        return recipe.model_copy(update=told)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _asked(cases: Sequence[Case]) -> str:
    return f"{len(cases)} questions about {len({case.picture_id for case in cases})} pictures"


def _percent(estimate: Estimate) -> str:
    low, high = estimate.ends
    return f"{100 * estimate.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _printable(line: str) -> str:
    """A line of a comment: nothing in a name may end it."""
    return "".join(char if char.isprintable() else " " for char in line)
