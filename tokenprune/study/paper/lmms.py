"""Result files of lmms-eval 0.7.3: ``DATE_results.json``, beside it ``DATE_samples_TASK.jsonl`` of --log_samples."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenprune.budget import Budget
from tokenprune.study.paper.runs import Run, TaskScore

NAME = "lmms-eval"
KEYS = {"results", "configs", "higher_is_better", "config"}
BUDGETS = ("keep", "average", "final")
OURS = "tokenprune"
"""Name of our model in lmms-eval; other models are methods by their own names."""
RESULTS = "_results.json"


def runs(file: Path, told: Mapping[str, Any]) -> list[Run]:
    """The one run of a file."""
    name, given = told["config"]["model"], _arguments(told["config"].get("model_args"))
    recipe = given.get("recipe", "none") if name == OURS else name
    budget = next((str(Budget(kind, float(given[kind]))) for kind in BUDGETS if kind in given), "")  # type: ignore[arg-type]
    untouched = name == OURS and recipe == "none"
    scored = {task: list(_scores(file, told, task)) for task in told["results"]}
    groups = {group: below for group, below in told.get("group_subtasks", {}).items() if below and scored.get(group)}
    hidden = {task for below in groups.values() for task in below}  # a group's own score stands for them
    return [
        Run(
            source=file,
            model=str(given.get("pretrained") or given.get("model") or told.get("model_name", "")),
            method="untouched" if untouched else str(recipe),
            budget="" if untouched else budget,
            untouched=untouched,
            tasks={task: scores for task, scores in scored.items() if scores and task not in hidden},
            when=file.name,
        )
    ]


def _arguments(given: object) -> dict[str, Any]:
    """`model_args`, which is text or a mapping."""
    if isinstance(given, Mapping):
        return dict(given)
    pairs = (part.partition("=") for part in str(given or "").split(","))
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}


def _scores(file: Path, told: Mapping[str, Any], task: str) -> Iterator[TaskScore]:
    """A score for each metric of the task, in the order of the file."""
    samples = file.with_name(f"{file.name.removesuffix(RESULTS)}_samples_{task}.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()] if samples.exists() else []
    counted = told.get("n-samples", {}).get(task, {}).get("effective")
    for key, value in told["results"][task].items():
        metric, comma, _ = key.partition(",")
        if not comma or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            continue
        each = _each(lines, metric)
        if each is not None and not math.isclose(fmean(each.values()), value, rel_tol=1e-6, abs_tol=1e-6):
            each = None  # a score that is no mean over questions, such as F1
        better = told["higher_is_better"].get(task, {}).get(metric) is not False
        yield TaskScore(metric, float(value), counted, better, each, drawn_with=f"{NAME} {task}")


def _each(lines: list[dict[str, Any]], metric: str) -> dict[str, float] | None:
    """Score of each question, by its number and what it asked; None where a question has no number for a score."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        score = line.get(metric)
        if not isinstance(score, bool | int | float) or not math.isfinite(score):
            return None
        asked = sha256(repr((line.get("input"), line.get("target"))).encode()).hexdigest()[:12]
        found[f"{line['doc_id']} {asked}"].append(float(score))
    return {key: fmean(scores) for key, scores in found.items()} or None
