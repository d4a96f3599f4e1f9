"""Does the machine run shorter prompts at the same rate? The untouched model alone, at every length recipes make.

    python benchmarks/performance/lengths.py         # writes lengths.json beside it; 15 minutes, two quiet cores

The ceiling of a recipe counts multiply-adds. Products of few rows run at a lower rate on most machines, whoever asks
for them; reading `lm_head` and the host's work in `generate` take the same time for any prompt. So each layer of a
recipe is given the time of an untouched layer on a prompt of that length, measured here without tokenprune, and all
else the time that it has in the untouched model. That sum is what the machine allows a method that costs nothing: with
weights as PyTorch's own product takes them, and laid out beforehand (prepack.py).
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import Quiet, keep_freed_memory, machine
from cpu import KEEPS, RECIPES
from prepack import prepack

from tokenprune.bench.sides import UNTOUCHED, open_side
from tokenprune.budget import tokens_per_layer
from tokenprune.builder import build
from tokenprune.models.load import quiet
from tokenprune.models.noise import usual_pictures
from tokenprune.models.sketch import sketch_config, sketch_model
from tokenprune.recipe import load_recipe

HERE = Path(__file__).parent
LAYERS, WIDTH, VISION, TEXT = 10, 1024, 576, 64
ROUNDS = {1: 7, 4: 3}
"""By batch size."""


def lengths(name: str, keep: int) -> list[int]:
    """Tokens that enter each layer, text included."""
    pipeline = build(load_recipe(name, keep=keep), depth=LAYERS)
    counts = [count for count in pipeline.plan(VISION, [(1, 24, 24)]) if count is not None]
    return [n + TEXT for n in tokens_per_layer(pipeline.steps(), counts, LAYERS, VISION)]


@torch.no_grad()
def seconds(model: Any, wanted: list[int], batch: int, quiet: Quiet) -> tuple[float, dict[int, float]]:
    """Median time of a prefill of `batch` pictures, and of the decoder alone on prompts of each length, by turns."""
    prompts = {n: torch.randn(batch, n, WIDTH) for n in wanted}
    taken: dict[int, list[float]] = {n: [] for n in wanted}
    prefill = []
    with ExitStack() as stack:
        side = open_side(stack, UNTOUCHED, model, usual_pictures(model.config, VISION))
        prompt = side.prompt(text=TEXT, batch=batch)
        for number in range(ROUNDS[batch] + 1):
            quiet.wait()
            prefill.append(side.run(prompt, 1).prefill)
            for n in wanted if number % 2 else reversed(wanted):
                quiet.wait()
                start = time.perf_counter()
                model.model.language_model(inputs_embeds=prompts[n], use_cache=True)
                taken[n].append(time.perf_counter() - start)
    return statistics.median(prefill[1:]), {n: statistics.median(times[1:]) for n, times in taken.items()}


def main() -> None:
    torch.set_num_threads(2)
    keep_freed_memory()
    quiet()
    calm = Quiet()
    config = sketch_config("llava-1.5-7b", layers=LAYERS, width=WIDTH)
    model = sketch_model(config, dtype=torch.float32, device=torch.device("cpu"))
    made = {f"{name}/{keep}": lengths(name, keep) for name in RECIPES for keep in KEEPS}
    whole = VISION + TEXT
    out = HERE / "lengths.json"
    found = json.loads(out.read_text(encoding="utf-8"))["batches"] if out.exists() else {}
    wanted = sorted({whole, *(n for each in made.values() for n in each)})
    packed = copy.deepcopy(model)
    prepack(packed)
    for batch, weights in product(ROUNDS, ("plain", "packed")):
        key = f"{weights}/{batch}"
        if key not in found:
            prefill, taken = seconds(packed if weights == "packed" else model, wanted, batch, calm)
            rate = {n: taken[whole] / whole / (taken[n] / n) for n in taken}
            saved = {name: taken[whole] - sum(taken[n] for n in each) / LAYERS for name, each in made.items()}
            possible = {name: prefill / (prefill - less) for name, less in saved.items()}
            found[key] = {"prefill": prefill, "seconds": taken, "rate": rate, "possible": possible}
            facts = {"machine": machine(), "lengths": made, "batches": found}
            out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for key, each in found.items():
        for n, rate in each["rate"].items():
            print(f"{key}, {n:>4} tokens: {each['seconds'][n]:.3f} s, {rate:.2f} of the rate at {whole}")
        for name, ratio in each["possible"].items():
            print(f"{key}, {name:<20} the machine allows a prefill {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
