"""`Run`: what one method scored at one budget, whatever file says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskScore:
    """The score of one method on one task."""

    metric: str
    value: float
    """As the file gives it."""
    questions: int | None
    higher_is_better: bool = True
    each: Mapping[str, float] | None = None
    """Score of each question, by what tells the question; None where the file does not say, or where the task's score
    is not their mean."""
    pictures: Mapping[str, str] | None = None
    """The picture of each question; None: the file does not say, and questions count as independent."""
    drawn_with: str = ""
    """Scores of one name here are of the same pictures, which are resampled together."""

    def picture(self, question: str) -> str:
        """What is resampled as a whole: the question's picture, or, where that is not known, the question."""
        return question if self.pictures is None else self.pictures[question]


@dataclass(frozen=True)
class Run:
    """One method at one budget on some tasks of one model."""

    source: Path
    model: str
    method: str
    budget: str
    """Empty: at the method's own counts."""
    untouched: bool
    """Whether others are relative to it."""
    tasks: Mapping[str, Sequence[TaskScore]]
    """By task; of several metrics the first is the one that its table shows."""
    when: str = ""
    """Sorts later runs behind earlier ones."""
    average: float | None = None
    """Vision tokens in a layer, mean over layers, as a share of all; None where the file does not say."""
    flops_share: float | None = None
