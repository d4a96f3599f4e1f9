"""The rules of plan.md, applied to the results of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grid

Result = dict[str, Any]
GATE = 0.85
NEAR = 0.1
"""A bias index whose interval lies within this of 0 counts as none."""


@dataclass(frozen=True)
class Finding:
    """What came out for one prediction: whether it holds (None: below the gate), and the numbers behind it."""

    holds: bool | None
    numbers: str


def task_accuracy(result: Result, label: str, task: str, budget: str = "") -> float:
    """Accuracy of a row of the grid or of the whole recipes."""
    for row in (*result["grid"], *result["whole"]):
        if (row["condition"], row["budget"]) == (label, budget) and task in row["tasks"]:
            return float(row["tasks"][task]["accuracy"]["value"])
    raise KeyError((label, budget, task))


def bias(result: Result, criterion: str, layer: int, task: str = "localisation") -> dict[str, float]:
    """Bias index of a criterion at a layer: value, low, high."""
    for found in result["audits"]:
        if (found["criterion"], found["layer"], found["task"]) == (criterion, layer, task):
            return dict(found["rows"]["bias"])
    raise KeyError((criterion, layer, task))


def passes_gate(result: Result) -> bool:
    return task_accuracy(result, "untouched", "localisation") >= GATE


def _main(count: int = grid.MAIN_COUNT) -> str:
    return str(grid.Budget("keep", count))


def _difference(result: Result, first: str, second: str, layer: int) -> dict[str, float]:
    for found in result["grid_contrasts"]:
        place = (found["first"], found["second"], found["layer"], found["budget"], found["task"])
        if place == (first, second, layer, _main(), "localisation"):
            return dict(found["difference"])
    raise KeyError((first, second, layer))


def _points(change: dict[str, float]) -> str:
    return f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _index(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def _early(text: Callable[[int], str]) -> str:
    return "; ".join(f"K = {layer}: {text(layer)}" for layer in grid.EARLY)


def f1(result: Result) -> Finding:
    found = [bias(result, "attention", layer) for layer in grid.EARLY]
    holds = all(estimate["low"] > NEAR for estimate in found)
    return Finding(holds, _early(lambda layer: _index(bias(result, "attention", layer))))


def f2(result: Result) -> Finding:
    def mean(layers: tuple[int, ...]) -> float:
        return sum(bias(result, "attention", layer)["value"] for layer in layers) / len(layers)

    late = tuple(layer for layer in grid.LAYERS if layer not in grid.EARLY)
    return Finding(mean(late) < mean(grid.EARLY), f"early {mean(grid.EARLY):+.2f}, late {mean(late):+.2f}")


def f3(result: Result) -> Finding:
    def lost(task: str, layer: int) -> float:
        before = task_accuracy(result, "untouched", task)
        return 1 - task_accuracy(result, f"attention.{layer}", task, _main()) / before

    tasks = ("localisation", "existence", "ground")
    losses = {layer: [lost(task, layer) for task in tasks] for layer in grid.EARLY}
    holds = any(place >= 0.6 and max(rest) <= 0.1 for place, *rest in losses.values())
    named = {
        layer: ", ".join(f"{t} {-100 * x:+.0f} %" for t, x in zip(tasks, lost, strict=True))
        for layer, lost in losses.items()
    }
    return Finding(holds, _early(lambda layer: named[layer]))


def f4(result: Result) -> Finding:
    gaps = {layer: result["thirds"][f"attention.{layer}"]["bottom-top"] for layer in grid.EARLY}
    return Finding(all(gap["low"] > 0 for gap in gaps.values()), _early(lambda layer: _points(gaps[layer])))


def _no_bias(criterion: str) -> Callable[[Result], Finding]:
    def judge(result: Result) -> Finding:
        found = [bias(result, criterion, layer) for layer in grid.EARLY]
        holds = all(estimate["low"] >= -NEAR and estimate["high"] <= NEAR for estimate in found)
        return Finding(holds, _early(lambda layer: _index(bias(result, criterion, layer))))

    return judge


def c4(result: Result) -> Finding:
    found = [bias(result, "attention", layer) for layer in grid.EARLY]
    holds = all(estimate["high"] < -NEAR for estimate in found)
    return Finding(holds, _early(lambda layer: _index(bias(result, "attention", layer))))


def _better(first: str, second: str) -> Callable[[Result], Finding]:
    def judge(result: Result) -> Finding:
        changes = {layer: _difference(result, first, second, layer) for layer in grid.EARLY}
        return Finding(all(c["low"] > 0 for c in changes.values()), _early(lambda layer: _points(changes[layer])))

    return judge


def _whole(result: Result, first: str, second: str, task: str) -> list[tuple[str, dict[str, float]]]:
    return [
        (found["budget"], found["difference"])
        for found in result["whole_contrasts"]
        if (found["first"], found["second"], found["task"]) == (first, second, task)
    ]


def f9(result: Result) -> Finding:
    (change,) = [c for budget, c in _whole(result, "feather", "fastv", "localisation") if budget == _main(48)]
    return Finding(change["low"] > 0, _points(change))


def _sparse(second: str) -> Callable[[Result], Finding]:
    def judge(result: Result) -> Finding:
        changes = _whole(result, "sparsevlm", second, "ranked")
        holds = sum(change["low"] > 0 for _, change in changes) >= 2
        return Finding(holds, "; ".join(f"{budget}: {_points(change)}" for budget, change in changes))

    return judge


def s3(result: Result) -> Finding:
    found = result["adaptive"]
    numbers = f"{_points(found['difference'])} at {found['average']:.1f} and {found['fixed_average']:.1f} tokens"
    return Finding(found["difference"]["low"] > 0, numbers)


def _blind(result: Result, test: str, task: str) -> float:
    return float(result["blind"][test][task]["value"])


def b1(result: Result) -> Finding:
    lost = {}
    for task in ("localisation", "existence", "ground"):
        lost[task] = 1 - _blind(result, "shuffled ids", task) / task_accuracy(result, "untouched", task)
    place, *rest = lost.values()
    numbers = ", ".join(f"{task} {-100 * share:+.0f} %" for task, share in lost.items())
    return Finding(place >= 0.6 and max(rest) <= 0.1, numbers)


def b2(result: Result) -> Finding:
    def gains(layer: int) -> list[float]:
        return [
            _blind(result, f"chosen.{layer}", task) - task_accuracy(result, f"attention.{layer}", task, _main())
            for task in ("existence", "ground")
        ]

    holds = all(gain >= -0.05 for layer in grid.EARLY for gain in gains(layer))
    return Finding(
        holds, _early(lambda layer: "existence {:+.1f}, ground {:+.1f}".format(*(100 * g for g in gains(layer))))
    )


def b3(result: Result) -> Finding:
    tasks = [task for task in grid.GRID_TASKS if task != "existence"]
    shares = {
        test: {task: _blind(result, test, task) / task_accuracy(result, "untouched", task) for task in tasks}
        for test in ("text only", "grey")
    }
    worst = {test: max(by_task.items(), key=lambda item: item[1]) for test, by_task in shares.items()}
    numbers = "; ".join(f"{test}: at most {100 * share:.0f} % of {task}" for test, (task, share) in worst.items())
    return Finding(all(share <= 0.5 for _, share in worst.values()), numbers)


RULES: dict[str, tuple[str, Callable[[Result], Finding]]] = {
    "F1": ("attention prefers the bottom early", f1),
    "F2": ("less so later", f2),
    "F3": ("localisation collapses, other tasks hide it", f3),
    "F4": ("the top is lost first", f4),
    "F5": ("without the rotary embedding no bias", _no_bias("no-rope")),
    "F6": ("without it localisation recovers", _better("no-rope", "attention-vision")),
    "F7": ("coverage helps further", _better("no-rope+grid", "no-rope")),
    "F8": ("uniform beats early attention", _better("uniform", "attention")),
    "F9": ("FEATHER beats FastV", f9),
    "S1": ("raters beat all text", _sparse("sparsevlm.all-text")),
    "S2": ("recycling helps", _sparse("sparsevlm.no-recycling")),
    "S3": ("the adaptive rank beats fixed counts", s3),
    "B1": ("shuffled ids cost localisation and little else", b1),
    "B2": ("what is left of other tasks was not passed on before", b2),
    "B3": ("the scenes cannot be answered blind", b3),
}
_SHORT: dict[str, tuple[str, str, Callable[[Result], Finding]]] = {
    "half": ("H", "half of the steps are enough for the bias", f1),
    "no-text": ("C1", "without text there is no bias", _no_bias("attention")),
    "uniform-text": ("C2", "without a recency prior there is no bias", _no_bias("attention")),
    "no-rotary": ("C3", "without a rotary embedding there is no bias", _no_bias("attention")),
    "reversed-ids": ("C4", "with reversed ids the bias flips to the top", c4),
    "equal-ids": ("C5", "without distances between vision tokens there is no bias", _no_bias("attention")),
}
FULL = "-full"
"""Ending of the names of controls that were trained as long as the shipped weights; the others half as long."""
CONTROLS = _SHORT | {f"{name}{FULL}": rule for name, rule in _SHORT.items() if name != "half"}
"""By model: the one rule that a control is there for."""
MODELS = ("seed-0", "seed-1", "seed-2", *CONTROLS)
"""All models of plan.md, in its order."""


def findings(result: Result) -> dict[str, tuple[str, Finding]]:
    """Prediction and finding of every rule that applies to this model; a control below the gate is not judged."""
    if result["name"] in CONTROLS:
        name, text, judge = CONTROLS[result["name"]]
        finding = judge(result)
        if not passes_gate(result):
            share = task_accuracy(result, "untouched", "localisation")
            finding = Finding(None, f"{finding.numbers}; localises {100 * share:.1f} %, below the gate")
        return {name: (text, finding)}
    return {name: (text, judge(result)) for name, (text, judge) in RULES.items()}


def outcome(results: list[Result]) -> str:
    """The word for FEATHER's claim that plan.md fixes, over all models that have the grid."""
    found = [findings(result) for result in results]
    lines = [f"F{number}" for number in range(1, 8)]
    everywhere = [line for line in lines if all(each[line][1].holds for each in found)]
    if all(passes_gate(result) for result in results) and everywhere == lines:
        return "reproduced"
    if not any(each["F1"][1].holds for each in found):
        return "not seen at this scale"
    return f"partly ({', '.join(everywhere) or 'no line holds on every model'})"
