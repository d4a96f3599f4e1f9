"""Every learned recipe, fitted to the embedded model on training scenes and measured on held-out ones.

    python benchmarks/learned/fit.py --seeds 0 1 2

Each is compared, question by question, with its own untrained self, with random choice and with an even layout, at
equal numbers of tokens; adaptive recipes also at the counts that they choose, with baselines at what these come to.
Fits and answers are kept in `--runs`: the same command goes on where it was stopped. Writes `fit.json` beside this
file, after every fit. A recipe that is not better than its baselines is in it like any other.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import Progress

from tokenprune.budget import Budget
from tokenprune.core.files import whole_file
from tokenprune.engine.weights import host_of
from tokenprune.families.anatomy import anatomy
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.written import learned_parts, write_weights
from tokenprune.parts.learned import Learned
from tokenprune.recipe import Recipe, list_learned_recipes, load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases, training_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import Condition, Evaluation, difference, evaluate, holm, make_conditions, sign_flip

BESIDE = ("random", "uniform")


def plan_of(recipe: Recipe, options: argparse.Namespace, seed: int) -> Plan:
    """Attention teaches scorers, and cheaply; whatever else learns can only learn from predictions."""
    roles = {role for stage in recipe.stages for role, part in stage.parts.items() if issubclass(part.part, Learned)}
    aim = options.aim or ("attention" if roles == {"scorer"} and recipe.budget is not None else "logits")
    return Plan(aim=aim, steps=options.steps, batch=options.batch, seed=seed)


def untrained(model: Any, recipe: Recipe, folder: Path, seed: int) -> Path:
    """The recipe with the weights that its training starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = learned_parts(fresh_stages(recipe, host_of(anatomy(model)), seed=seed))
    return write_weights(recipe, parts, folder, made_by="benchmarks/learned/fit.py, untrained")[0]


def conditions_of(recipes: dict[str, Path], budgets: Sequence[Budget], draws: int) -> list[Condition]:
    """Recipes by label, and the baselines, at each budget."""
    made = []
    for label, path in recipes.items():
        made += [replace(each, label=label) for each in make_conditions([load_recipe(path)], budgets, baselines=False)]
    if budgets:
        made += make_conditions(BESIDE, budgets, draws=draws, baselines=False)
    return [each for each in made if each.kind == "recipe"]


def scores_of(
    evaluation: Evaluation, group: tuple[str, str], tasks: Sequence[str] | None = None
) -> tuple[Any, list[str]]:
    """Whether each question was answered right in each draw of a condition, ``[N, draws]``, and the pictures ``[N]``.

    Args:
        evaluation: of all conditions.
        group: label and budget.
        tasks: of the questions that count; those that the untouched model can do when left out.
    """
    counted = tasks or evaluation.ranked or tuple(evaluation.tasks)
    of = [index for index, case in enumerate(evaluation.cases) if case.task in counted]
    right = [each.right for each in evaluation.outcomes if each.condition.group == group]
    return np.array(right, float).T[of], [evaluation.cases[index].picture_id for index in of]


def compared(
    evaluation: Evaluation, first: tuple[str, str], second: tuple[str, str], tasks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Accuracy of one condition minus that of another on the same questions (see `scores_of`)."""
    one, pictures = scores_of(evaluation, first, tasks)
    other = scores_of(evaluation, second, tasks)[0]
    change, p = (of(one.mean(1), other.mean(1), pictures) for of in (difference, sign_flip))
    return {"than": " ".join(second).strip(), "difference": change.to_dict(), "p": p}


def corrected(versus: Sequence[dict[str, Any]]) -> None:
    """Give each of these differences its p-value after Holm's correction for all of them."""
    for each, p in zip(versus, holm([each["p"] for each in versus]), strict=True):
        each["p_holm"] = p


def told(evaluation: Evaluation, group: tuple[str, str], others: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One condition: accuracy, tokens, cost, and how much better it is than others."""
    row = next(row for row in evaluation.rows if (row.label, row.budget) == group)
    versus = [compared(evaluation, group, other) for other in others]
    return {**row.to_dict(), "versus": versus}


def measure(
    model: Any, processor: Any, name: str, seed: int, options: argparse.Namespace, cases: Sequence[Case]
) -> Any:
    """Fit one recipe and ask everything."""
    recipe, folder = load_recipe(name), options.runs / f"{name}-{seed}"
    plan = plan_of(recipe, options, seed)
    began = time.perf_counter()
    with Progress() as bar:
        task = bar.add_task(f"{name}, seed {seed}: fit", total=plan.steps)
        fitted = fit(
            model,
            processor,
            recipe,
            training_cases(options.training),
            folder,
            plan=plan,
            progress=lambda done, steps, loss: bar.update(task, completed=done),
        )
    seconds = time.perf_counter() - began
    recipes = {"fitted": fitted.recipe, "untrained": untrained(model, recipe, folder / "untrained", seed)}
    budgets = [Budget("keep", keep) for keep in options.keep]

    def ask(conditions: Sequence[Condition]) -> Evaluation:
        return evaluate(
            model, processor, cases, conditions, batch_size=options.batch_size, packed=options.packed,
            output=folder / "answers",
        )  # fmt: skip

    evaluation = ask(conditions_of(recipes, budgets, options.draws))
    rows = []
    for budget in budgets:
        others = [(label, str(budget)) for label in ("untrained", *BESIDE)]
        rows += [told(evaluation, group, others) for group in (("fitted", str(budget)),)]
        rows += [told(evaluation, other, ()) for other in others]
    if recipe.budget is None:  # adaptive: its own counts, and the baselines at what they come to
        own = conditions_of({"fitted": fitted.recipe}, (), 1)
        row = ask(own).rows[1]
        equal = Budget("average", round(row.average / row.total, 4))
        everything = ask([*own, *conditions_of({}, [equal], options.draws)])
        rows.append(told(everything, ("fitted", ""), [(label, str(equal)) for label in BESIDE]))
        rows += [told(everything, (label, str(equal)), ()) for label in BESIDE]
    return {
        "recipe": name,
        "seed": seed,
        "plan": plan.to_dict(),
        "seconds": round(seconds, 1),
        "best_step": fitted.best,
        "loss_before": fitted.looks[0][1],
        "loss_after": min(loss for _, loss in fitted.looks),
        "rows": rows,
    }


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON takes them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, with the machine and the versions that they were made on."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made = {**results, "machine": platform.machine(), "versions": versions}
    with whole_file(file) as writing:
        writing.write((json.dumps(made, indent=1) + "\n").encode())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipes", nargs="+", choices=list_learned_recipes(), default=list(list_learned_recipes()))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each is a fit of its own")
    made.add_argument("--keep", nargs="+", type=float, default=[0.1, 0.25])
    made.add_argument("--aim", choices=("attention", "logits"), help="of every fit; by the recipe when left out")
    made.add_argument("--steps", type=int, default=400)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--training", type=int, default=600, help="scenes to learn from")
    made.add_argument("--scenes", type=int, default=100, help="held-out scenes to ask about")
    made.add_argument("--draws", type=int, default=3, help="of random choice")
    made.add_argument("--batch-size", type=int, default=32, help="of questions")
    made.add_argument("--packed", action="store_true", help="share what questions about one picture share")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--device", default="cpu")
    made.add_argument("--runs", type=Path, default=Path("runs/learned"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("fit.json"))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, processor = load_embedded()
    model.to(options.device)
    cases = scene_cases(options.scenes)
    results = []
    for seed in options.seeds:
        for name in options.recipes:
            results.append(measure(model, processor, name, seed, options, cases))
            about = {"options": plain(options), "questions": len(cases), "results": results}
            write_results(options.out, about)
            for row in results[-1]["rows"]:
                for other in row["versus"]:
                    change = other["difference"]
                    told = f"{change['value']:+.3f} [{change['low']}, {change['high']}] than {other['than']}"
                    print(f"{name}, seed {seed}: {row['condition']} {row['budget']} {told}")


if __name__ == "__main__":
    main()
