"""CPU targets: does time go with the multiply-adds, on a LLaVA of about 200 M parameters?

    python benchmarks/performance/cpu.py             # writes cpu.json beside it; half an hour on two quiet cores
    python benchmarks/performance/cpu.py --quick     # a model of toy size, to see that it runs; writes nothing lasting

LLaVA-1.5's shape at 10 layers and width 1024, random weights, float32, 576 vision and 64 other tokens, two threads.
Three recipes at 192, 128 and 64 vision tokens from their first place on, for one picture and for four, eager and
compiled, each in the same rounds as the untouched model; and a recipe that keeps everything. For one picture also with
weights that are laid out beforehand (prepack.py), in all models of the round. What is there is not measured again: the
command goes on where it stopped. Nothing else may run meanwhile: with a core taken, these numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import torch
from cells import Results, compare
from prepack import prepack

from tokenprune.models.load import quiet
from tokenprune.models.sketch import sketch_config, sketch_model
from tokenprune.recipe import Recipe, load_recipe

RECIPES = ("sparsevlm-v1.5", "feather", "fastv")
KEEPS = (192, 128, 64)
BATCHES = (1, 4)
"""One picture: the products of a pruned layer have few rows, which is what slows them down. Four: they have not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size, into a temporary folder")
    parser.add_argument("--eager", action="store_true", help="leave compiled cells out")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, an odd number")
    options = parser.parse_args()
    layers, width = (4, 128) if options.quick else (10, 1024)
    rounds, still = (1, 1) if options.quick else (options.rounds, 2 * options.rounds + 1)
    torch.set_num_threads(2)
    quiet()
    config = sketch_config("llava-1.5-7b", layers=layers, width=width)
    model = sketch_model(config, dtype=torch.float32, device=torch.device("cpu"))
    parameters = sum(weight.numel() for weight in model.parameters())
    folder = Path(mkdtemp()) if options.quick else Path(__file__).parent
    settings = {"layers": layers, "width": width, "parameters": parameters, "tokens": 576, "text": 64, "rounds": rounds}
    results = Results(folder / "cpu.json", settings)
    for batch, how in product(BATCHES, ("eager",) if options.eager else ("eager", "compiled")):
        measured = partial(compare, model, tokens=576, text=64, batch=batch, compile=how == "compiled")
        if batch == 1:
            everything = {"keep 1.0": load_recipe("sparsevlm-v1.5", keep=1.0)}
            results.add(f"{how}/{batch}/keep 1.0", partial(measured, everything, rounds=still))
        for name in RECIPES:
            results.add(f"{how}/{batch}/{name}", partial(measured, _sides(name), rounds=rounds))
    prepack(model)
    for name in RECIPES:
        measured = partial(compare, model, _sides(name), tokens=576, text=64)
        results.add(f"prepacked/1/{name}", partial(measured, rounds=rounds))
    _report(results)


def _sides(name: str) -> dict[str, Recipe]:
    return {str(keep): load_recipe(name, keep=keep) for keep in KEEPS}


def _report(results: Results) -> None:
    """Every target, and whether it was met."""
    for cell, found in results.cells.items():
        for row in found.get("rows", [])[1:]:
            speed = row["speedup"]["prefill"]
            if row["name"] == "keep 1.0":
                met = {"attached costs ≤ 1 %": speed["value"] >= 0.99}
            else:
                met = {
                    "≥ 0.95 of the ratio": row["reached"]["prefill"] >= 0.95,
                }
                if row["method_share"] is not None:  # a compiled prefill has no clock inside
                    met["method ≤ 3 %"] = row["method_share"] <= 0.03
            marks = ", ".join(f"{name}: {'yes' if good else 'NO'}" for name, good in met.items())
            print(
                f"{cell:<24} {row['name']:>8}  {speed['value']:.3f}× ({speed['low']:.3f} … {speed['high']:.3f}) of "
                f"{row['ceiling']['prefill']:.3f}×, reached {row['reached']['prefill']:.3f}, "
                f"method {math.nan if row['method_share'] is None else row['method_share']:.2%}  {marks}"
            )


if __name__ == "__main__":
    main()
