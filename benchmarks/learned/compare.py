"""The shipped weights beside training-free recipes, at equal multiply-adds, on held-out scenes.

    python benchmarks/learned/compare.py --scenes 60

Each learned recipe whose weights come with the package (`ship.py` makes them) is asked the same questions as its own
untrained self and as recipes without weights, each with as many tokens as the same share of the untouched prefill pays
for. Differences are paired, question by question, with intervals over pictures. Answers are kept in `--runs`: the same
command goes on where it was stopped. Writes `compare.json` beside this file; a recipe that is not better is in it like
any other.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from fit import compared, conditions_of, told, untrained

from tokenprune.budget import Budget
from tokenprune.core.files import whole_file
from tokenprune.recipe import list_learned_recipes, load_recipe, recipe_path
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import evaluate, make_conditions

SHARES = {"glimpseprune": 0.85}
"""Of the untouched prefill; a stage deep in the model can pay for no less."""
SHARE = 0.48
"""Of all others: about a quarter of the tokens, where a recipe acts after vision."""
FREE = ("uniform", "pool", "divprune", "fastv")
"""Recipes without weights, beside `random`."""


def shipped() -> list[str]:
    """Learned recipes that name weights."""
    return [name for name in list_learned_recipes() if "weights: " in recipe_path(name).read_text(encoding="utf-8")]


def at_share(
    model: Any, processor: Any, names: Sequence[str], share: float, cases: Sequence[Case], options: Any
) -> Any:
    """Everything that is asked at one share of the untouched prefill."""
    budget = Budget("flops", share)
    folder = options.runs / f"{share}"
    recipes: dict[str, Path] = {}
    for name in names:
        recipes[name] = recipe_path(name)
        recipes[f"{name}, untrained"] = untrained(model, load_recipe(name), folder / "untrained" / name, 0)
    conditions = conditions_of(recipes, [budget], options.draws)  # with random and uniform
    more = [name for name in FREE if name != "uniform"]
    conditions += [each for each in make_conditions(more, [budget], baselines=False) if each.kind == "recipe"]
    evaluation = evaluate(model, processor, cases, conditions, batch_size=options.batch_size, output=folder / "answers")
    group = lambda label: (label, str(budget))  # noqa: E731
    beside = ["random", *FREE]
    rows = [told(evaluation, group(name), [group(f"{name}, untrained"), *map(group, beside)]) for name in names]
    rows += [told(evaluation, group(label), []) for label in (*(f"{name}, untrained" for name in names), *beside)]
    right = {row.label: row.overall.value for row in evaluation.rows}
    best = max(FREE, key=right.__getitem__)
    return {
        "share": share,
        "untouched": evaluation.rows[0].to_dict(),
        "best_free": best,
        "versus_best_free": {name: compared(evaluation, group(name), group(best)) for name in names},
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scenes", type=int, default=60, help="held-out scenes to ask about")
    made.add_argument("--draws", type=int, default=3, help="of random choice")
    made.add_argument("--batch-size", type=int, default=32, help="of questions")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--runs", type=Path, default=Path("runs/compared"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("compare.json"))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, processor = load_embedded()
    cases = scene_cases(options.scenes)
    names = shipped()
    if not names:
        raise SystemExit("no learned recipe names weights: run benchmarks/learned/ship.py first")
    groups: dict[float, list[str]] = {}
    for name in names:
        groups.setdefault(SHARES.get(name, SHARE), []).append(name)
    results = {
        "scenes": options.scenes,
        "questions": len(cases),
        "fingerprints": {name: load_recipe(name).fingerprint for name in names},
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shares": [at_share(model, processor, own, share, cases, options) for share, own in groups.items()],
    }
    with whole_file(options.out) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    for share in results["shares"]:
        for name, against in share["versus_best_free"].items():
            change = against["difference"]
            print(f"{name}: {change['value']:+.3f} [{change['low']}, {change['high']}] than {share['best_free']}")


if __name__ == "__main__":
    main()
