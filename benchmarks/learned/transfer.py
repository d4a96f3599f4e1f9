"""What a fit is worth where it was not made: on tasks that it has not seen, and on pictures of another size.

    python benchmarks/learned/transfer.py

`text-conditioned` is fitted to the embedded model on questions of one half of the tasks, of the other, and of all,
three times each, every time from other pictures and another start. All are asked held-out scenes at one share of the
tokens, beside the same recipe untrained and recipes without weights. Pictures of another size then go to the same model
with its tower's position embeddings interpolated, which it was never trained with: tasks that it can no longer do whole
are not counted. p-values are also given after Holm's correction for all differences of the file. Fits and answers are
kept in `--runs`: the same command goes on where it was stopped. Writes `transfer.json` beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fit import compared, conditions_of, corrected, plain, scores_of, untrained, write_results
from torch import nn
from torch.nn.functional import interpolate

from tokenprune.budget import Budget
from tokenprune.fitting import Plan, fit
from tokenprune.recipe import load_recipe
from tokenprune.scenes import TASKS, load_embedded
from tokenprune.scenes.cases import scene_cases, training_cases
from tokenprune.study.evaluate import Condition, Evaluation, accuracy, evaluate

RECIPE = "text-conditioned"
HALVES = {
    "places": ("localisation", "relation", "box", "counting", "ground"),
    "contents": ("colour", "shape", "size", "existence", "code"),
}
TAUGHT = {**HALVES, "all": TASKS}
SIZES = (80, 112, 128)
"""Sides of pictures, in pixels; the model was trained with 96."""


def fits(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, list[Path]]:
    """Recipes by what they were taught, one for each seed, and the same untrained."""
    made: dict[str, list[Path]] = {label: [] for label in (*TAUGHT, "untrained")}
    for seed in options.seeds:
        plan = Plan(aim="attention", steps=options.steps, batch=16, held_out=0.01, patience=20, seed=seed)
        for label, tasks in TAUGHT.items():
            cases = training_cases(options.training, tasks=tasks, first=seed * options.training)
            folder = options.runs / f"{label}-{seed}"
            made[label].append(fit(model, processor, RECIPE, cases, folder, plan=plan).recipe)
            print(f"fitted: {label}, seed {seed}", flush=True)
        folder = options.runs / f"untrained-{seed}"
        made["untrained"].append(untrained(model, load_recipe(RECIPE), folder, seed))
    return made


def conditions(recipes: dict[str, list[Path]], budget: Budget) -> list[Condition]:
    """Fits of one label are draws of the same thing."""
    made = conditions_of({}, [budget], len(next(iter(recipes.values()))))  # random and uniform
    for label, paths in recipes.items():
        for seed, path in enumerate(paths):
            (one,) = [each for each in conditions_of({label: path}, [budget], 1) if each.label == label]
            made.append(replace(one, seed=seed))
    return made


def told(evaluation: Evaluation, label: str, budget: str, others: Sequence[str], tasks: Sequence[str]) -> Any:
    """One label on some tasks: of all its fits together, of each, and how much better than others."""
    scores, pictures = scores_of(evaluation, (label, budget), tasks)
    return {
        "label": label,
        "accuracy": accuracy(scores.mean(1), pictures).to_dict(),
        "each": scores.mean(0).tolist(),
        "versus": [compared(evaluation, (label, budget), (other, budget), tasks) for other in others],
    }


def on_tasks(evaluation: Evaluation, budget: str) -> list[dict[str, Any]]:
    """What was taught one half of the tasks, and what the other, on each half."""
    made = []
    for half, tasks in HALVES.items():
        (other,) = [each for each in HALVES if each != half]
        counted = [task for task in tasks if task in evaluation.ranked]
        beside = ["untrained", "random", "uniform"]
        labels = {half: [*beside], other: [half, *beside], "all": [half, *beside]}
        rows = [told(evaluation, label, budget, others, counted) for label, others in labels.items()]
        rows += [told(evaluation, label, budget, [], counted) for label in beside]
        made.append({"tasks": counted, "half": half, "other": other, "rows": rows})
    return made


def with_size(model: Any, processor: Any, side: int) -> None:
    """Give the model pictures of another size, its tower's position embeddings interpolated as usual for ViTs."""
    config, tower = model.config.vision_config, model.model.vision_tower
    (embeddings,) = [each for each in tower.modules() if hasattr(each, "position_embedding")]
    first, places = embeddings.position_embedding.weight.detach().split([1, embeddings.num_patches])
    old, new = config.image_size // config.patch_size, side // config.patch_size
    grid = interpolate(places.T.reshape(1, -1, old, old), (new, new), mode="bicubic")
    weight = torch.cat([first, grid[0].flatten(1).T])
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight)
    embeddings.position_ids = torch.arange(len(weight))[None]
    embeddings.num_positions, embeddings.num_patches, embeddings.image_size = len(weight), new * new, side
    config.image_size = side
    processor.image_processor.size = processor.image_processor.crop_size = {"height": side, "width": side}


def on_sizes(recipes: dict[str, list[Path]], budget: Budget, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fits on all tasks, at the size they were made with, on pictures of others."""
    made = []
    for side in SIZES:
        model, processor = load_embedded()
        with_size(model, processor, side)
        found = evaluate(
            model, processor, scene_cases(options.size_scenes), conditions(recipes, budget),
            packed=True, output=options.runs / "answers",
        )  # fmt: skip
        tasks, beside = found.ranked, ["untrained", "random", "uniform"]
        rows = [told(found, "all", str(budget), beside, tasks)]
        rows += [told(found, label, str(budget), [], tasks) for label in beside]
        whole = told(found, "untouched", "", [], tasks)
        tokens = found.rows[0].total
        made.append({"side": side, "tokens": tokens, "tasks": list(tasks), "untouched": whole, "rows": rows})
        print(f"{side} pixels: {len(tasks)} tasks counted", flush=True)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each is a fit of its own")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--training", type=int, default=200, help="scenes to learn from, others for each seed")
    made.add_argument("--keep", type=float, default=0.25)
    made.add_argument("--scenes", type=int, default=80, help="held-out scenes to ask about")
    made.add_argument("--size-scenes", type=int, default=40, help="of those, for each other size")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("transfer.json"))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, processor = load_embedded()
    recipes, budget = fits(model, processor, options), Budget("keep", options.keep)
    cases = scene_cases(options.scenes)
    answers = options.runs / "answers"
    evaluation = evaluate(model, processor, cases, conditions(recipes, budget), packed=True, output=answers)
    results = {
        "recipe": RECIPE,
        "options": {key: value for key, value in plain(options).items() if key not in ("runs", "out")},
        "questions": len(cases),
        "on_tasks": on_tasks(evaluation, str(budget)),
        "on_sizes": on_sizes({label: recipes[label] for label in ("all", "untrained")}, budget, options),
    }
    parts = [*results["on_tasks"], *results["on_sizes"]]
    corrected([other for part in parts for row in part["rows"] for other in row["versus"]])
    write_results(options.out, results)
    for part in parts:
        for row in part["rows"]:
            for other in row["versus"]:
                change = other["difference"]
                better = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
                print(f"{part.get('half', part.get('side'))}: taught {row['label']}: {better} than {other['than']}")


if __name__ == "__main__":
    main()
