"""Right answers of every recipe on held-out scenes at three equal costs: python benchmarks/methods/scenes.py

The embedded model answers the same questions under each recipe. A budget is an average over all decoder layers
(`average`), so a recipe that starts late pays for its early layers; or multiply-adds of the whole prefill (`flops`),
so that a recipe pays for its own work, too. Where it cannot get so low, the row says so. Every question's answer is
kept, so that any two recipes can be compared in pairs. The run is resumable: what is in the file is not asked again,
and a recipe whose fingerprint has changed is.

Two halves of scenes that share nothing: on ``choose`` recipes of our own are chosen, ``report`` is what the page shows.

    python benchmarks/methods/scenes.py                        # every shipped recipe, writes scenes.json
    python benchmarks/methods/scenes.py --kind flops           # writes flops.json
    python benchmarks/methods/scenes.py --half choose -r mine.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenprune as tp
from tokenprune.budget import BudgetKind
from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.evaluate import SMALLER, UNTOUCHED, Condition, evaluate, make_conditions

HERE = Path(__file__).parent
BUDGETS = {"average": (0.5, 0.25, 0.11), "flops": (0.65, 0.5, 0.4)}
"""Shares of each kind of budget. With ``flops``, as near to the same tokens as plain numbers come: the tower alone
costs a third of the prefill here."""
FILES = {"average": HERE / "scenes.json", "flops": HERE / "flops.json"}
HALVES = {"choose": 20_000, "report": 30_000}
"""First scene of each half."""
SCENES = 60
TOKENS, TEXT = 144, 15
"""Vision tokens of a picture, and other tokens of a prompt on average."""
NO_BUDGET = {"none", "vtw"}
"""Recipes that a budget does not change."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--recipe", action="append", help="only this one, by name or path; repeatable")
    parser.add_argument("--kind", choices=BUDGETS, default="average", help="what is equal")
    parser.add_argument("--budget", type=float, action="append", help="only this share; repeatable")
    parser.add_argument("--half", choices=HALVES, default="report")
    parser.add_argument("--out", type=Path, help="scenes.json or flops.json by default")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out = options.out or FILES[options.kind]
    torch.set_num_threads(options.threads)
    # A smaller picture saves no multiply-adds here: the tower scales it up again.
    plain = ["untouched", *([SMALLER] if options.kind == "average" else [])]
    names = options.recipe or [*plain, *(name for name in list_recipes() if name not in NO_BUDGET)]
    model, processor = tp.load("embedded")
    cases = scene_cases(SCENES, first=HALVES[options.half])
    for name in names:
        recipe = None if name in ("untouched", SMALLER) else load_recipe(name)
        for share in (options.budget or BUDGETS[options.kind]) if name != "untouched" else (1.0,):
            run(options, model, processor, cases, name, recipe, share)


def run(options: Any, model: Any, processor: Any, cases: Any, name: str, recipe: Recipe | None, share: float) -> None:
    """Ask one recipe at one budget, and write its row; nothing where the row is there."""
    title = name if recipe is None else recipe.name
    key = f"{title} {share}"
    try:
        condition = condition_of(model, name, recipe, options.kind, share)
        print_as = condition.fingerprint
        if read(options.out, options.half).get(key, {}).get("fingerprint") == print_as:
            return
        result = evaluate(model, processor, cases, [condition], packed=recipe is None or not is_inside(recipe))
    except BudgetError as error:
        write(options.out, options.half, key, {"recipe": title, "budget": share, "out of reach": str(error)})
        return
    except TokenPruneError as error:
        if "budget" not in str(error) and "cannot" not in str(error):
            raise
        write(options.out, options.half, key, {"recipe": title, "budget": share, "out of reach": str(error)})
        return
    rows = [row for row in result.rows if (row.label == "untouched") == (name == "untouched")]
    outcomes = [o for o in result.outcomes if (o.condition.kind == "untouched") == (name == "untouched")]
    right = np.array([outcome.right for outcome in outcomes], np.float64).mean(0)
    (row,) = rows
    print(f"{options.half} {key}: {row.overall.value:.3f}, {row.average:.1f} tokens", file=sys.stderr, flush=True)
    made = {
        "recipe": title,
        "budget": share,
        "fingerprint": print_as,
        "accuracy": [row.overall.value, row.overall.low, row.overall.high],
        "average": row.average,
        "final": row.final,
        "flops_share": row.flops_share,
        "tasks": {task: estimate.value for task, estimate in row.tasks.items()},
        "draws": len(outcomes),
        **({"clusters": clusters(cases)} if name == "untouched" else {}),
        "right": [round(float(value), 3) for value in right],
    }
    write(options.out, options.half, key, made)


def clusters(cases: Any) -> list[int]:
    """The number of each question's scene: answers about one picture go together in an interval."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(case.picture_id, len(numbers)) for case in cases]


def condition_of(model: Any, name: str, recipe: Recipe | None, kind: BudgetKind, share: float) -> Condition:
    """The recipe, or a smaller image, at this budget."""
    if name == "untouched":
        return UNTOUCHED
    budget = tp.Budget(kind, share)
    if recipe is not None and kind == "flops" and is_inside(recipe):
        budget = tp.Budget("keep", share_inside(model, recipe, share))
    made = make_conditions([] if recipe is None else [recipe], [budget], draws=1, baselines=recipe is None)
    wanted = SMALLER if recipe is None else recipe.name
    return next(each for each in made if each.label == wanted)


def is_inside(recipe: Recipe) -> bool:
    """Whether it acts inside the vision tower, which takes no budget `flops` and runs once for each question."""
    return any(stage.place.kind == "in_vision" for stage in recipe.stages)


def share_inside(model: Any, recipe: Recipe, flops: float) -> float:
    """The largest share of each picture at which a prompt of average length stays within `flops` of its prefill."""
    within = (
        kept / TOKENS
        for kept in range(TOKENS, 0, -1)
        if tp.ledger(model, recipe, keep=kept / TOKENS, text=TEXT).share("prefill") <= flops
    )
    found = next(within, None)
    if found is None:
        raise BudgetError(f"{recipe.name}: one token of each picture takes more than {flops} of the prefill")
    return found


def read(path: Path, half: str) -> dict[str, Any]:
    """Rows of one half that are in the file."""
    found: dict[str, Any] = json.loads(path.read_text()).get(half, {}) if path.exists() else {}
    return found


def write(path: Path, half: str, key: str, row: dict[str, Any]) -> None:
    """Add one row."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole.setdefault(half, {})[key] = row
    part = path.with_suffix(".part")
    lines = [
        f'"{name}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(rows.items())) + "\n}"
        for name, rows in sorted(whole.items())
    ]
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(path)


if __name__ == "__main__":
    main()
