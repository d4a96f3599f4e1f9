"""The shipped weights beside training-free recipes, at equal multiply-adds, on held-out scenes.

    python benchmarks/learned/compare.py

Each learned recipe whose weights come with the package (`ship.py` makes them) is asked the same questions as its own
untrained self and as recipes without weights, each with as many tokens as the same share of the untouched prefill pays
for. Those that choose a count of their own are asked at that, too, beside recipes at the share which it comes to.
Differences are paired, question by question, with intervals over pictures; p-values are also given after Holm's
correction for all differences of the file. Answers are kept in `--runs`: the same command goes on where it was stopped.
Writes `compare.json` beside this file; a recipe that is not better is in it like any other. With `--recipes` these are
asked alone, and the rows of the others stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fit import compared, conditions_of, corrected, untrained, write_results

from tokenprune.budget import Budget
from tokenprune.recipe import list_learned_recipes, load_recipe, recipe_path
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import Condition, Evaluation, evaluate, make_conditions

SHARES = {"glimpseprune": 0.85, "glimpseprune-token": 0.85}
"""Of the untouched prefill; a stage deep in the model can pay for no less."""
SHARE = 0.48
"""Of all others: about a quarter of the tokens, where a recipe acts after vision."""
FREE = ("uniform", "pool", "divprune", "fastv")
"""Recipes without weights, beside `random`."""
BESIDE = ("random", *FREE)
FEW = 4
"""Of the scenes, what a test asks again in seconds."""
Group = tuple[str, str]


def shipped() -> list[str]:
    """Learned recipes that name weights."""
    return [name for name in list_learned_recipes() if "weights: " in recipe_path(name).read_text(encoding="utf-8")]


class Asking:
    """The model, the questions, and where answers are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.processor = load_embedded()
        self.cases: list[Case] = scene_cases(options.scenes)
        self.options = options

    def ask(self, conditions: Sequence[Condition]) -> Evaluation:
        """All conditions over all questions."""
        return evaluate(
            self.model, self.processor, self.cases, conditions,
            batch_size=self.options.batch_size, packed=True, output=self.options.runs / "answers",
        )  # fmt: skip

    def free(self, budget: Budget) -> list[Condition]:
        """What goes beside learned recipes, at a budget."""
        more = make_conditions(FREE[1:], [budget], baselines=False)
        return conditions_of({}, [budget], self.options.draws) + [each for each in more if each.kind == "recipe"]

    def at_share(self, names: Sequence[str], share: float) -> Iterator[dict[str, Any]]:
        """Learned recipes, their untrained selves and others, all at one share of the untouched prefill."""
        budget = Budget("flops", share)
        recipes: dict[str, Path] = {}
        for name in names:
            recipes[name] = recipe_path(name)
            recipes[f"{name}, untrained"] = untrained(
                self.model, load_recipe(name), self.options.runs / "untrained" / name, 0
            )
        learned = make_each(recipes, budget)
        evaluation = self.ask([*learned, *self.free(budget)])
        for name in names:
            others = [(label, str(budget)) for label in (f"{name}, untrained", *BESIDE)]
            yield told(evaluation, (name, str(budget)), share, others)

    def at_own(self, name: str) -> dict[str, Any]:
        """A recipe at the counts it chooses, beside itself at equal counts and others, all at what these cost."""
        own = make_each({name: recipe_path(name)}, None)
        share = round(self.ask(own).rows[1].flops_share, 3)
        budget = Budget("flops", share)
        evaluation = self.ask([*own, *make_each({name: recipe_path(name)}, budget), *self.free(budget)])
        return told(evaluation, (name, ""), share, [(label, str(budget)) for label in (name, *BESIDE)])

    def few(self, names: Sequence[str]) -> dict[str, Any]:
        """How many questions about the first scenes each recipe answers right at a quarter of the tokens."""
        budget, cases = Budget("keep", 0.25), self.cases[: len(scene_cases(FEW))]
        conditions = make_each({name: recipe_path(name) for name in names}, budget)
        found = evaluate(self.model, self.processor, cases, conditions, packed=True)
        right = {each.condition.label: sum(each.right) for each in found.outcomes}
        return {"scenes": FEW, "keep": budget.value, "questions": len(cases), "right": right}


def make_each(recipes: dict[str, Path], budget: Budget | None) -> list[Condition]:
    """Recipes by label, without baselines."""
    return [
        each
        for label, path in recipes.items()
        for each in conditions_of({label: path}, () if budget is None else [budget], 1)
        if each.label == label
    ]


def told(evaluation: Evaluation, group: Group, share: float, others: Sequence[Group]) -> dict[str, Any]:
    """One learned recipe: accuracy, tokens, cost, and how much better it is than others."""
    rows = {(row.label, row.budget): row for row in evaluation.rows}

    def one(row: Any) -> dict[str, Any]:
        told = row.to_dict()
        kept = ("budget", "draws", "fingerprint", "accuracy", "average", "final", "flops_share", "method_seconds")
        tasks = {task: each["accuracy"] for task, each in told["tasks"].items()}
        return {"recipe": row.label, **{key: told[key] for key in kept}, "tasks": tasks}

    versus = []
    for other in others:
        change = compared(evaluation, group, other)
        versus.append({**one(rows[other]), "difference": change["difference"], "p": change["p"]})
    untouched = one(evaluation.rows[0])
    return {**one(rows[group]), "share": share, "own_counts": not group[1], "untouched": untouched, "versus": versus}


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipes", nargs="+", choices=shipped(), help="these alone; the others' rows stay")
    made.add_argument("--scenes", type=int, default=80, help="held-out scenes to ask about")
    made.add_argument("--draws", type=int, default=3, help="of random choice")
    made.add_argument("--batch-size", type=int, default=32, help="of questions")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--runs", type=Path, default=Path("runs/compared"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("compare.json"))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    every = shipped()
    if not every:
        raise SystemExit("no learned recipe names weights: run benchmarks/learned/ship.py first")
    names = options.recipes or every
    asking = Asking(options)
    groups: dict[float, list[str]] = {}
    for name in names:
        groups.setdefault(SHARES.get(name, SHARE), []).append(name)
    rows = []
    for share, own in sorted(groups.items()):
        rows += asking.at_share(own, share)
    rows += [asking.at_own(name) for name in names if load_recipe(name).budget is None]
    few = asking.few(names)
    if options.recipes:
        known = json.loads(options.out.read_text(encoding="utf-8"))
        if known["scenes"] != options.scenes:
            raise SystemExit(
                f"{options.out} was measured on {known['scenes']} scenes: give the same number, or no names"
            )
        rows = [row for row in known["rows"] if row["recipe"] in every and row["recipe"] not in names] + rows
        rows.sort(
            key=lambda row: (row["own_counts"], not row["own_counts"] and row["share"], every.index(row["recipe"]))
        )
        few["right"] = {**known["few"]["right"], **few["right"]}
    corrected([other for row in rows for other in row["versus"]])
    results = {
        "scenes": options.scenes,
        "questions": len(asking.cases),
        "fingerprints": {name: load_recipe(name).fingerprint for name in (*every, *BESIDE)},
        "few": few,
        "rows": rows,
    }
    write_results(options.out, results)
    for row in rows:
        for other in row["versus"]:
            change = other["difference"]
            better = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            print(f"{row['recipe']} {row['budget']}: {better} than {other['recipe']}, p {other['p_holm']:.2g}")


if __name__ == "__main__":
    main()
