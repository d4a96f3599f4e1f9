"""The weights that come with tokenprune: every learned recipe, and the request of `visionthink`, fitted to the embedded
model on training scenes.

    python benchmarks/learned/ship.py

Fits are kept in `--runs`: the same command goes on where it was stopped, and what is fitted already costs nothing. Each
finished fit puts its weights into `tokenprune/weights/`, their digests into the recipe that names them, and its plan,
losses and machine into `ship.json` beside this file. What the weights are worth is another script's to say:
`compare.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress

from tokenprune.core.files import whole_file
from tokenprune.fitting import Fitted, Plan, fit
from tokenprune.parts.learned import Learned
from tokenprune.recipe import Recipe, list_learned_recipes, load_recipe, recipe_path
from tokenprune.recipe.weights import digest
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import training_cases

ROOT = Path(__file__).resolve().parents[2]
SCENES = 300
"""Training scenes, about nine questions each."""
BY_PREDICTIONS = Plan(aim="logits", steps=120, batch=8, keep=(0.1, 0.5), held_out=0.01, patience=20)
"""For recyclers and counts, which attention teaches nothing. 0.01 of the scenes are 30 questions, asked 20 times."""
PLANS: dict[str, Plan] = {
    "text-conditioned": Plan(aim="attention", steps=200, batch=16, held_out=0.01, patience=20),
    "visionthink": Plan(aim="reward", steps=400, batch=64),
}
"""Of the recipes that are fitted in another way."""
VARIANTS = {"visionthink": "trained"}
"""The variant whose weights they are, where it is not the recipe: the embedded tower sees all pictures at one size."""


def named(text: str, recipe: Recipe, digests: dict[str, str]) -> str:
    """The text of a recipe in which each learned part names its weights, comments and all else as they are.

    Args:
        text: with each learned part as ``{type: NAME, ...}`` on one line, in the order of the recipe; a learned request
            as ``again.weights: ...`` of a variant.
        recipe: what the text says.
        digests: of the files, by name, in that order.
    """
    if recipe.again is not None:
        ((file, told),) = digests.items()
        return re.sub(r"(again\.weights: )[^,}\s]+", rf"\g<1>{file}#{told}", text)
    done, left = "", text
    learned = [part for stage in recipe.stages for part in stage.parts.values() if issubclass(part.part, Learned)]
    for part, (file, told) in zip(learned, digests.items(), strict=True):
        found = re.search(rf"\{{type: {part.type}((?:, (?!weights:)[^,}}]*)*)(?:, weights: [^,}}]*)?\}}", left)
        if found is None:
            raise SystemExit(f"{recipe.name}: no {{type: {part.type}, ...}} to write the weights into")
        done += left[: found.start()] + f"{{type: {part.type}{found[1]}, weights: {file}#{told}}}"
        left = left[found.end() :]
    return done + left


def place(fitted: Fitted, name: str, weights: Path) -> dict[str, str]:
    """Put the weights of a fit where the package has them, and their names and digests into the recipe.

    Returns:
        Digests by name of file.
    """
    path, files = recipe_path(name), {file.name: file.read_bytes() for file in fitted.weights}
    digests = {file: digest(data) for file, data in files.items()}
    text = named(path.read_text(encoding="utf-8"), load_recipe(name), digests)
    weights.mkdir(exist_ok=True)
    for file, data in files.items():
        with whole_file(weights / file) as copy:
            copy.write(data)
    with whole_file(path) as recipe:
        recipe.write(text.encode())
    return digests


def ship(model: Any, processor: Any, name: str, runs: Path) -> dict[str, Any]:
    """Fit one recipe, and put what comes of it into the package."""
    plan = PLANS.get(name, BY_PREDICTIONS)
    began, first = time.perf_counter(), None
    with Progress() as bar:
        task = bar.add_task(name, total=plan.steps)

        def told(done: int, total: int, loss: float) -> None:
            nonlocal first
            if loss == loss:  # else questions are being asked, before the first step
                first = done - 1 if first is None else first
            bar.update(task, completed=done, total=total)

        recipe, cases = load_recipe(name, variant=VARIANTS.get(name)), training_cases(SCENES)
        fitted = fit(model, processor, recipe, cases, runs / name, plan=plan, progress=told)
    return {
        "plan": plan.to_dict(),
        "scenes": SCENES,
        "files": place(fitted, name, ROOT / "tokenprune" / "weights"),
        "bytes": sum(file.stat().st_size for file in fitted.weights),
        "best_step": fitted.best,
        "looks": [[step, round(loss, 5)] for step, loss in fitted.looks],
        "losses": [round(loss, 4) for loss in fitted.losses],
        "steps_of_last_call": len(fitted.losses) - (first or 0),
        "seconds_of_last_call": round(time.perf_counter() - began, 1),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*list_learned_recipes(), *VARIANTS]
    made.add_argument("--recipes", nargs="+", choices=known, default=known)
    made.add_argument("--runs", type=Path, default=Path("runs/shipped"))
    made.add_argument("--threads", type=int, default=1)
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, processor = load_embedded()
    log = Path(__file__).with_name("ship.json")
    for name in options.recipes:
        row = ship(model, processor, name, options.runs)
        logged = json.loads(log.read_text()) if log.exists() else {}
        if name in logged and logged[name]["files"] == row["files"]:
            continue  # fitted before; how long that took is told already
        with whole_file(log) as file:
            file.write((json.dumps({**logged, name: row}, indent=1, sort_keys=True) + "\n").encode())
        print(f"{name}: held-out loss {row['looks'][0][1]} → {min(loss for _, loss in row['looks'])}")


if __name__ == "__main__":
    main()
