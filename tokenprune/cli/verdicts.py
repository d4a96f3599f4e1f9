"""The last line of a command: what somebody ran it for, no stronger than its interval allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenprune.cost.account import Ledger
    from tokenprune.study.bench import Bench
    from tokenprune.study.evaluate import ConditionRow, Evaluation


def speed(what: str, value: float, low: float | None, high: float | None, paired: str = "by round") -> str:
    """Whether `what` came sooner: `value` times as fast, between `low` and `high`, which few rounds do not have."""
    if low is None or high is None:
        return f"{what} {value:.2f}× as fast, in too few runs to tell that from noise"
    if low <= 1 <= high:
        return f"{what}: no difference beyond this run's noise ({low:.2f}–{high:.2f}× as fast)"
    slower = "" if low > 1 else ", which is slower"
    return f"{what} {value:.2f}× as fast{slower} (95 %: {low:.2f}–{high:.2f}, paired {paired})"


def benched(result: Bench) -> list[str]:
    """A line for each batch size: the recipe's speed-up, and the most that its multiply-adds allow."""
    rows = {row.batch: row for row in result.rows if row.name == result.recipe}
    lines = []
    for batch, row in rows.items():
        if (found := row.speedup()) is not None:
            about = "" if row.ledger.exact else "≈"
            told = speed("prefill", found.value, found.low, found.high)
            lines.append(f"batch of {batch}: {told}; its multiply-adds allow {about}{row.ceiling():.2f}×")
    return lines


def counted(told: Ledger) -> str:
    """What is left of the multiply-adds up to the first token, and of the whole answer."""
    about = "" if told.exact else "≈"
    prefill, whole = (f"{about}{told.share(view):.1%}" for view in ("prefill", "end_to_end"))
    return f"multiply-adds up to the first token: {prefill} of the untouched model's; with the answer: {whole}"


def evaluated(result: Evaluation) -> list[str]:
    """A line for each budget: the best recipe, beside the untouched model and the best baseline."""
    untouched, *rest = result.rows
    word = "right" if result.measure == "accuracy" else "the same"
    lines = []
    for budget in dict.fromkeys(row.budget for row in rest):
        recipes, baselines = _parted([row for row in rest if row.budget == budget])
        if not (budget and recipes):  # without a budget costs differ, and nothing is the best
            continue
        best = recipes[0]
        head = f"best of {len(recipes)} recipes at {budget}" if len(recipes) > 1 else str(budget)
        line = f"{head}: {best.label}, {100 * best.overall.value:.1f} % {word}"
        if result.measure == "accuracy":
            line += f" (untouched {100 * untouched.overall.value:.1f} %)"
        lines.append(line + _against(result, best, baselines))
    return lines


def _parted(rows: list[ConditionRow]) -> tuple[list[ConditionRow], list[ConditionRow]]:
    """Recipes and baselines, the best first."""
    ordered = sorted(rows, key=lambda row: -row.overall.value)
    return [row for row in ordered if not row.baseline], [row for row in ordered if row.baseline]


def _against(result: Evaluation, best: ConditionRow, baselines: list[ConditionRow]) -> str:
    """The paired difference from the best baseline, where there is one."""
    from tokenprune.study.statistics import FEWEST

    for pair in result.pairs if baselines else ():
        names = (pair.first, pair.second)
        if pair.budget != best.budget or set(names) != {best.label, baselines[0].label}:
            continue
        if len({case.picture_id for case in result.cases}) < FEWEST:
            return f"; too few pictures to tell it apart from {baselines[0].label}"
        low, high = pair.change.ends
        sign = 1 if names[0] == best.label else -1
        ends = sorted((100 * sign * low, 100 * sign * high))
        if ends[0] <= 0 <= ends[1]:
            return f"; not told apart from {baselines[0].label}"
        told = f"{100 * sign * pair.change.value:+.1f} points (95 %: {ends[0]:+.1f}…{ends[1]:+.1f})"
        return f"; {told} against {baselines[0].label}"
    return ""
