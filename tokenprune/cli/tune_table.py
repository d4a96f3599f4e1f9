"""What `tokenprune tune` tells people: what was tried, how the winner does on other pictures, and where it lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.cli.eval_table import FEW
from tokenprune.cli.terminal import console, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tokenprune.study.evaluate import Case, Estimate
    from tokenprune.study.tune import Tuned

BEST = 8
"""Candidates that are shown; --json has all."""
REASONS = 3
"""Reasons that are shown why combinations cannot run."""
ALPHA = 0.05
"""Adjusted p-value from which a difference is called chance."""


def show(result: Tuned, *, model: str, file: Path) -> None:
    """Print the search and its report; last the winner's file, and what it gains."""
    screen = console()
    tried = f"{len(result.candidates)} recipes tried ({result.method})"
    screen.print(f"{model}, {result.budget}: {tried}", highlight=False, markup=False)
    screen.print()
    screen.print(f"[dim]chosen on {_asked(result.chosen_on)}")
    screen.print(_tried(result))
    screen.print()
    screen.print(f"[dim]reported on {_asked(result.report.cases)}, none of them among those above")
    screen.print(_report(result))
    screen.print()
    for line in _notes(result):
        screen.print(f"[dim]{line}")
    screen.print(f"winner: {file}", markup=False, highlight=False, soft_wrap=True)
    screen.print(_last(result), markup=False, highlight=False)


def _tried(result: Tuned) -> RenderableType:
    from rich.text import Text

    made = table("", f">{_right(result)}", ">95 %", ">FLOPs", "what was chosen")
    shown = result.ranked[:BEST]
    given = next((each for each in result.ranked if not each.choices), None)
    if given is not None and given not in shown:
        shown = [*shown, given]
    for each in shown:
        place = str(1 + result.ranked.index(each))
        numbers = (f"{100 * each.right.value:.1f}", _range(each.right, ".1f"), f"{each.flops_share:.0%}")
        made.add_row(place, *numbers, Text(each.label))
    return made


def _report(result: Tuned) -> RenderableType:
    from rich.text import Text

    from tokenprune.study.tune.result import WINNER

    made = table("", f">{_right(result)}", ">95 %", ">FLOPs", f">{WINNER} better by", ">p, Holm")
    for row in result.report.rows:
        numbers = (f"{100 * row.overall.value:.1f}", _range(row.overall, ".1f"), f"{row.flops_share:.0%}")
        beside: tuple[str, ...] = ("", "")
        if row.label not in (WINNER, "untouched"):
            pair = result.against(row.label)
            change = f"{100 * pair.change.value:+.1f}  {_range(pair.change, '+.1f')}"
            beside = (change, f"{pair.p_holm:.4f}")
        made.add_row(Text(row.label, style="dim" if row.baseline else ""), *numbers, *beside)
    return made


def _notes(result: Tuned) -> list[str]:
    lines = ["95 %: intervals by resampling pictures; better by: paired and in points, on the same questions"]
    lines.append("the first table is of the best of many, so its numbers are too high; the second is not")
    if result.report.measure == "agreement":
        lines.append("same: answers whose words are those of the untouched model's, right or wrong")
    if any(row.label == "smaller-image" and row.flops_share > 0.999 for row in result.report.rows):
        lines.append("smaller-image: this model scales it up again and computes all tokens, so it saves no FLOPs")
    fewest = min(len({case.picture_id for case in half}) for half in (result.chosen_on, result.report.cases))
    if fewest < FEW:
        lines.append(f"only {fewest} pictures in a half: with fewer than {FEW} the intervals are too narrow; take more")
    if result.skipped:
        lines.append(f"{len(result.skipped)} combinations cannot run here, such as:")
        reasons = Counter(each.reason for each in result.skipped).most_common(REASONS)
        lines += [f"  {count} ×  {_escape(reason)}" for reason, count in reasons]
    return lines


def _last(result: Tuned) -> str:
    """How the winner does beside the best of the others, and whether that is more than chance."""
    row, rival = result.reported, result.rival
    pair = result.against(rival.label)
    sure = " (chance may do that)" if pair.p_holm >= ALPHA else ""
    right = "right" if result.report.measure == "accuracy" else "the same"
    found = f"{100 * row.overall.value:.1f} % {right} at {row.flops_share:.0%} of the FLOPs"
    return f"{found}, {100 * pair.change.value:+.1f} points on {rival.label}{sure}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _right(result: Tuned) -> str:
    return "right %" if result.report.measure == "accuracy" else "same %"


def _asked(cases: Sequence[Case]) -> str:
    return f"{len(cases)} questions about {len({case.picture_id for case in cases})} pictures"


def _range(estimate: Estimate, form: str) -> str:
    low, high = (f"{100 * end:{form}}" for end in estimate.ends)
    return f"{low}…{high}" if "+" in form else f"{low}–{high}"
