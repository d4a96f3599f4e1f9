"""Who looks, and what it learned from: GlimpsePrune's learned token beside the last text token, at equal multiply-adds.

    python benchmarks/learned/glimpse.py

`glimpseprune` and `glimpseprune-token` differ in nothing but whose attention the predictor reads. Each is asked as it
is shipped (fitted to the model's own answers), as a fit to boxes around what is asked for has left it, and untrained,
all with as many tokens as the same share of the untouched prefill pays for, the token's own way through the layers
included. Differences are paired, question by question, with intervals over pictures; p-values after Holm's correction
for all differences of the file. Fits and answers are kept in `--runs`: the same command goes on where it was stopped.
Writes `glimpse.json` beside this file, whatever comes of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import Asking, make_each
from fit import compared, conditions_of, corrected, untrained, write_results
from ship import BY_PREDICTIONS, SCENES

from tokenprune.budget import Budget
from tokenprune.fitting import fit
from tokenprune.recipe import load_recipe, recipe_path
from tokenprune.scenes.cases import training_cases

WHO = {"last": "glimpseprune", "token": "glimpseprune-token"}
BY_BOXES = replace(BY_PREDICTIONS, aim="boxes", held_out=0.05)
TAUGHT = ("answers", "boxes", "untrained")


def recipes_of(asking: Asking, runs: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The six recipes by label, and what the fits to boxes came to."""
    made, fits = {}, {}
    for who, name in WHO.items():
        data, folder = training_cases(SCENES), runs / "boxes" / name
        fitted = fit(asking.model, asking.processor, load_recipe(name), data, folder, plan=BY_BOXES)
        fits[who] = {"best_step": fitted.best, "looks": [[step, round(loss, 5)] for step, loss in fitted.looks]}
        made[f"{who}, answers"] = recipe_path(name)
        made[f"{who}, boxes"] = fitted.recipe
        made[f"{who}, untrained"] = untrained(asking.model, load_recipe(name), runs / "untrained" / name, 0)
    return made, fits


def pairs() -> list[tuple[str, str]]:
    """What is set against what."""
    return [
        *((f"token, {taught}", f"last, {taught}") for taught in TAUGHT),
        *((f"{who}, {taught}", f"{who}, untrained") for who in WHO for taught in TAUGHT[:2]),
        *((f"{who}, {taught}", "uniform") for who in WHO for taught in TAUGHT[:2]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scenes", type=int, default=40, help="held-out scenes to ask about")
    made.add_argument("--shares", type=float, nargs="+", default=[0.85, 0.80], help="of the untouched prefill")
    made.add_argument("--draws", type=int, default=3, help="of random choice")
    made.add_argument("--batch-size", type=int, default=32, help="of questions")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--runs", type=Path, default=Path("runs/glimpse"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("glimpse.json"))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    asking = Asking(options)
    recipes, fits = recipes_of(asking, options.runs)
    rows, versus = [], []
    for share in options.shares:
        budget = Budget("flops", share)
        evaluation = asking.ask([*make_each(recipes, budget), *conditions_of({}, [budget], options.draws)])
        for row in evaluation.rows:
            told = row.to_dict()
            tasks = {task: each["accuracy"] for task, each in told["tasks"].items()}
            kept = ("accuracy", "average", "final", "flops_share", "fingerprint")
            rows.append({"share": share, "recipe": row.label, **{key: told[key] for key in kept}, "tasks": tasks})
        for one, other in pairs():
            found = compared(evaluation, (one, str(budget)), (other, str(budget)))
            versus.append({"share": share, "recipe": one, **found, "than": other})
    corrected(versus)
    questions = len(asking.cases)
    write_results(
        options.out,
        {"scenes": options.scenes, "questions": questions, "plan": BY_BOXES.to_dict(), "fits": fits, "rows": rows,
         "versus": versus},
    )  # fmt: skip
    for each in versus:
        change = each["difference"]
        better = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        print(f"{each['share']:.2f} {each['recipe']}: {better} than {each['than']}, p {each['p_holm']:.2g}")


if __name__ == "__main__":
    main()
