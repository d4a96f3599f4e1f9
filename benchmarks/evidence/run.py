"""Run the experiment of plan.md on one model; resumable.

    python benchmarks/evidence/run.py --model runs/seed-0/embedded --name seed-0

Writes `results/NAME.json` beside this file. Finished answers are kept in `--work`; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import blind
import grid
import numpy as np
import torch
import transformers
import verdict
from numpy.typing import NDArray
from recency import recency
from rich.progress import Progress
from targets import target
from transformers import PreTrainedModel, ProcessorMixin

from tokenprune.engine.attach import attach
from tokenprune.scenes import load_embedded, make_scene
from tokenprune.scenes.answering import prompt
from tokenprune.scenes.cases import scene_cases
from tokenprune.scenes.digest import digest
from tokenprune.scenes.training.positions import position_table, read_positions
from tokenprune.scenes.world.generate import UNITS
from tokenprune.study.audit import Audit
from tokenprune.study.evaluate import UNTOUCHED, Case, Condition, Evaluation, difference, evaluate

HERE = Path(__file__).parent
Scores = dict[tuple[str, str], NDArray[np.float64]]
CONTRASTS = (
    ("no-rope", "attention-vision"),
    ("no-rope+grid", "no-rope"),
    ("attention-vision+grid", "attention-vision"),
    ("uniform", "attention"),
    ("no-rope", "attention"),
    ("attention", "random"),
    ("density-peaks", "uniform"),
)


def scores(result: Evaluation) -> Scores:
    """Right answers of each case, mean over draws, by (label, budget)."""
    draws: dict[tuple[str, str], list[list[bool]]] = {}
    for outcome in result.outcomes:
        draws.setdefault(outcome.condition.group, []).append(outcome.right)
    return {group: np.array(right, np.float64).mean(0) for group, right in draws.items()}


def contrast(made: Scores, cases: Sequence[Case], first: Any, second: Any, tasks: Iterable[str]) -> dict[str, float]:
    """Paired difference of two groups on `tasks`, with its interval."""
    wanted = set(tasks)
    of = np.array([case.task in wanted for case in cases])
    clusters = [case.picture_id for case in cases if case.task in wanted]
    estimate = difference(made[first][of], made[second][of], clusters)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def contrasts_of_grid(result: Evaluation) -> list[dict[str, Any]]:
    """Every contrast at every layer and count, for every task."""
    made, found = scores(result), []
    budgets = dict.fromkeys(row.budget for row in result.rows[1:])
    for budget in budgets:
        for layer in grid.LAYERS:
            for first, second in CONTRASTS:
                one, other = (f"{first}.{layer}", budget), (f"{second}.{layer}", budget)
                for task in grid.GRID_TASKS:
                    change = contrast(made, result.cases, one, other, [task])
                    place = {"budget": budget, "layer": layer, "first": first, "second": second, "task": task}
                    found.append(place | {"difference": change})
    return found


def thirds(result: Evaluation, count: int) -> dict[str, Any]:
    """Localisation by the third of the picture that the target lies in, and bottom minus top, for every criterion."""
    made = scores(result)
    boxes = [target(case) for case in result.cases if case.task == "localisation"]
    third = np.array([min(int((top + bottom) / 2 / UNITS * 3), 2) for _, top, _, bottom in boxes])
    chosen = np.array([case.task == "localisation" for case in result.cases])
    rng = np.random.default_rng(0)
    found = {}
    for (label, budget), values in made.items():
        if budget not in ("", str(grid.Budget("keep", count))):
            continue
        of = [values[chosen][third == place] for place in range(3)]
        drawn = [[rng.choice(part, len(part)).mean() for part in (of[0], of[2])] for _ in range(2000)]
        low, high = np.quantile(np.diff(np.array(drawn), axis=1), (0.025, 0.975))
        gap = {"value": of[2].mean() - of[0].mean(), "low": float(low), "high": float(high)}
        found[label] = {"thirds": [part.mean() for part in of], "n": [len(part) for part in of], "bottom-top": gap}
    return found


def audit(model: PreTrainedModel, processor: ProcessorMixin, criterion: str, layer: int, task: str) -> dict[str, Any]:
    """Where the criterion keeps its tokens, over the first scenes that can be asked."""
    asked = [
        (item.image, question.question)
        for item in map(make_scene, range(grid.AUDITED))
        for question in item.questions
        if question.task == task
    ]
    seen = Audit()
    with attach(model, grid.one_stage(criterion, layer, grid.MAIN_COUNT)) as attached:
        for start in range(0, len(asked), 25):
            batch = asked[start : start + 25]
            texts = [prompt(processor, question) for _, question in batch]
            inputs = processor(images=[image for image, _ in batch], text=texts, padding=True, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            seen.add(attached.report)
    (stage,) = seen.stages
    facts = stage.to_dict()
    return {name: facts[name] for name in ("pictures", "keep", "rows", "columns", "heat")}


def audits(model: PreTrainedModel, processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Every criterion that scores, at every layer, for both kinds of question."""
    return [
        {"criterion": criterion, "layer": layer, "task": task} | audit(model, processor, criterion, layer, task)
        for layer in grid.LAYERS
        for criterion in ("attention", "attention-vision", "no-rope")
        for task in ("localisation", "ground")
    ]


def bias_only(model: PreTrainedModel, processor: ProcessorMixin, work: Path) -> dict[str, Any]:
    """What the rule of a control needs: the untouched model's accuracy, and where tokens are kept."""
    untouched = evaluate(model, processor, scene_cases(grid.SCENES), [UNTOUCHED], output=work, packed=True)
    return {
        "recency": recency(model),
        "whole": rows(untouched),
        "grid": [],
        "audits": audits(model, processor),
    }


def rows(result: Evaluation) -> list[dict[str, Any]]:
    return [row.to_dict() for row in result.rows]


def run(
    model: PreTrainedModel, processor: ProcessorMixin, work: Path, name: str, counts: Sequence[int]
) -> dict[str, Any]:
    """All of plan.md on one model, the grid at `counts`."""

    def ask(what: str, conditions: list[Condition], tasks: Sequence[str] | None) -> Evaluation:
        cases = scene_cases(grid.SCENES, **({} if tasks is None else {"tasks": tasks}))
        bar = progress.add_task(f"{name}: {what}", total=None)

        def done(now: int, everything: int) -> None:
            progress.update(bar, completed=now, total=everything)

        return evaluate(model, processor, cases, conditions, output=work, packed=True, on_batch=done)

    with Progress() as progress:
        whole = ask("recipes", grid.whole_recipes(), None)
        own = ask("adaptive", grid.adaptive(None), None)
        average = round(own.rows[-1].average)
        fixed = ask("fixed", grid.adaptive(average), None)
        single = ask("grid", grid.grid(counts), grid.GRID_TASKS)
        bar = progress.add_task(f"{name}: blind", total=len(blind.TESTS) + len(blind.ORACLES))
        unseen = blind.run(model, processor, lambda: progress.advance(bar))
    merged = scores(own) | scores(fixed)
    adaptive, budgeted = (("sparsevlm", budget) for budget in ("", str(grid.Budget("average", average))))
    return {
        "recency": recency(model),
        "ranked": list(whole.ranked),
        "whole": rows(whole),
        "whole_contrasts": [
            {"budget": str(budget), "first": first, "second": second, "task": task}
            | {"difference": contrast(scores(whole), whole.cases, (first, str(budget)), (second, str(budget)), tasks)}
            for budget in (grid.Budget("keep", count) for count in grid.AVERAGES)
            for first, second in (
                ("feather", "fastv"),
                ("feather", "uniform"),
                ("feather", "pyramiddrop:feather"),
                ("sparsevlm", "sparsevlm.all-text"),
                ("sparsevlm", "sparsevlm.no-recycling"),
                ("sparsevlm", "random"),
            )
            for task, tasks in (("localisation", ["localisation"]), ("ranked", whole.ranked))
        ],
        "adaptive": {
            "average": own.rows[-1].average,
            "fixed_average": fixed.rows[-1].average,
            "rows": [own.rows[-1].to_dict(), fixed.rows[-1].to_dict()],
            "difference": contrast(merged, own.cases, adaptive, budgeted, own.ranked),
        },
        "grid": rows(single),
        "grid_contrasts": contrasts_of_grid(single),
        "thirds": thirds(single, grid.MAIN_COUNT),
        "blind": unseen,
        "audits": audits(model, processor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the experiment of plan.md on one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of weights, as training exports them")
    parser.add_argument("--name", required=True, choices=verdict.MODELS, help="name of the model in plan.md")
    parser.add_argument("--work", type=Path, help="folder of finished answers; default: evidence/ beside the weights")
    parser.add_argument("--main", action="store_true", help="the grid only at the count that the rules look at")
    parser.add_argument("--bias", action="store_true", help="only the untouched accuracy and the position bias")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not (options.model / "model.safetensors").exists():
        parser.error(f"--model: no model.safetensors in {options.model}; give embedded/ of a training run")
    torch.set_num_threads(options.threads)
    model, processor = load_embedded(options.model)
    training = json.loads((options.model.parent / "training.json").read_text(encoding="utf-8"))
    positions = training.get("positions", "raster")
    if positions != "raster":
        read_positions(model, position_table(positions, model.config.text_config.max_position_embeddings))
    work = options.work or options.model.parent / "evidence"
    facts = {
        "name": options.name,
        "weights": digest(options.model / "model.safetensors"),
        "training": training | {"positions": positions},
        "scenes": grid.SCENES,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    out = HERE / "results" / f"{options.name}.json"
    out.parent.mkdir(exist_ok=True)
    counts = () if options.bias else (grid.MAIN_COUNT,) if options.main else grid.COUNTS
    if options.bias:
        found = bias_only(model, processor, work)
    else:
        found = run(model, processor, work, options.name, counts)
    result = facts | {"counts": counts} | found
    out.write_text(json.dumps(compact(result)) + "\n", encoding="utf-8")


def compact(value: Any) -> Any:
    """Numbers to four decimals: more says nothing with a few hundred scenes."""
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item) for item in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
