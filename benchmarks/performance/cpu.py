"""CPU targets: does time go with the multiply-adds, on a LLaVA of about 200 M parameters?

    python benchmarks/performance/cpu.py             # writes cpu.json beside it; some four hours on two cores
    python benchmarks/performance/cpu.py --quick     # a model of toy size, to see that it runs; writes nothing lasting

LLaVA-1.5's shape at 10 layers and width 1024, random weights, float32, 576 vision and 64 other tokens, two threads.
Three recipes at 192, 128 and 64 vision tokens from their first place on, for one picture and for four, each in the same
rounds as the untouched model, and as that model with its sequence simply cut to the same lengths (cut.py), which is
what the machine allows any method; and a recipe that keeps everything, eager with the time inside its hooks too
(hooks.py). With weights that are laid out beforehand (prepack.py) in all models of the round, eager and compiled, and
with weights as PyTorch has them. What is there is not measured again: the command goes on where it stopped. Nothing
else may run meanwhile: with a core taken, these numbers mean nothing. Each run waits until the machine is as quiet as
it was at the start, but not for long (cells.py). A cell of one picture whose rounds leave open whether the machine
allows a row the target is measured once more.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from cells import Quiet, Results, compare, keep_freed_memory
from hooks import hook_share
from prepack import prepack

from tokenprune.families.load import quiet
from tokenprune.families.sketch import sketch_config, sketch_model
from tokenprune.recipe import load_recipe

KEEPS = (192, 128, 64)
ROUNDS = {"sparsevlm-v1.5": {1: 41, 4: 21}, "feather": {1: 41, 4: 21}, "fastv": {1: 41, 4: 13}}
"""Timed rounds of a recipe, by pictures. One is what the target is about; the products of a pruned layer have few rows
then, which slows them down. Four: no."""
MORE_ROUNDS = 40
"""Once more for a cell of one picture that leaves open whether the machine allows a row the target."""
KEEP_ALL_ROUNDS = 51
TARGET = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size and one recipe, into a temporary folder")
    parser.add_argument("--eager", action="store_true", help="leave compiled cells out")
    options = parser.parse_args()
    layers, width = (4, 128) if options.quick else (10, 1024)
    recipes, keeps = (list(ROUNDS)[:1], KEEPS[:1]) if options.quick else (list(ROUNDS), KEEPS)
    torch.set_num_threads(2)
    keep_freed_memory()
    quiet()
    config = sketch_config("llava-1.5-7b", layers=layers, width=width)
    plain = sketch_model(config, dtype=torch.float32, device=torch.device("cpu"))
    packed = copy.deepcopy(plain)
    prepack(packed)
    parameters = sum(weight.numel() for weight in plain.parameters())
    folder = Path(mkdtemp()) if options.quick else Path(__file__).parent
    settings = {"layers": layers, "width": width, "parameters": parameters, "tokens": 576, "text": 64}
    results = Results(folder / "cpu.json", {**settings, "freed memory": "kept", "limits": "cut"})
    calm = None if options.quick else Quiet()
    ways = (("packed", "eager"), ("plain", "eager"), ("packed", "compiled"))
    for (weights, how), batch in product(ways[:2] if options.eager else ways, (1, 4)):
        model = packed if weights == "packed" else plain
        measured = partial(compare, model, tokens=576, text=64, batch=batch, compile=how == "compiled", quiet=calm)
        for name in recipes:
            sides = {str(keep): load_recipe(name, keep=keep) for keep in keeps}
            rounds = 1 if options.quick else ROUNDS[name][batch]
            cell = f"{weights}/{how}/{batch}/{name}"
            results.add(cell, partial(measured, sides, rounds=rounds, limits=("prefill",)))
            rows = results.cells[cell].get("rows", [])
            if batch == 1 and not options.quick and _undecided(rows, rounds):
                results.replace(cell, partial(measured, sides, rounds=MORE_ROUNDS, limits=("prefill",), earlier=rows))
        if batch == 1:
            everything = {"keep 1.0": load_recipe("sparsevlm-v1.5", keep=1.0)}
            rounds = 1 if options.quick else KEEP_ALL_ROUNDS
            results.add(f"{weights}/{how}/{batch}/keep 1.0", partial(measured, everything, rounds=rounds))
        if batch == 1 and how == "eager":
            clocked = partial(hook_share, model, everything["keep 1.0"], tokens=576, text=64, rounds=rounds)
            results.add(f"{weights}/{how}/{batch}/hooks", lambda clocked=clocked: [{"share": clocked()}])
    _report(results)
    if calm is not None:
        print(f"{calm.noisy} runs of this call began although the machine was not quiet")


def _undecided(rows: list[dict[str, Any]], rounds: int) -> bool:
    """Whether a row of so many rounds misses the target, though the free method's interval does not lie below it."""
    return any(
        row["reached"]["prefill"] < TARGET <= row["machine"]["prefill"]["allows"]["high"] / row["ceiling"]["prefill"]
        for row in rows[1:]
        if len(row["samples"]) == rounds
    )


def _report(results: Results) -> None:
    """Every target, and whether it was met."""
    for cell, found in results.cells.items():
        for row in found.get("rows", [])[1:]:
            speed = row["speedup"]["prefill"]
            if row["name"] == "keep 1.0":
                told, met = "", {"attached costs ≤ 1 %": speed["value"] >= 0.99}
            else:
                limit = row["machine"]["prefill"]
                told = f", {limit['reached']['value']:.3f} of {limit['allows']['value']:.3f}× allowed"
                met = {f"≥ {TARGET} of the ratio": row["reached"]["prefill"] >= TARGET}
                if row["method_share"] is not None:  # a compiled prefill has no clock inside
                    met["method ≤ 3 %"] = row["method_share"] <= 0.03
            marks = ", ".join(f"{name}: {'yes' if good else 'NO'}" for name, good in met.items())
            print(
                f"{cell:<32} {row['name']:>8}  {speed['value']:.3f}× ({speed['low']:.3f} … {speed['high']:.3f}) of "
                f"{row['ceiling']['prefill']:.3f}×, reached {row['reached']['prefill']:.3f}{told}, "
                f"method {math.nan if row['method_share'] is None else row['method_share']:.2%}  {marks}"
            )


if __name__ == "__main__":
    main()
