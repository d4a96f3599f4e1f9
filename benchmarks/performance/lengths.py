"""Does the machine run shorter prompts at the same rate? The untouched decoder alone, at every length recipes make.

    python benchmarks/performance/lengths.py         # writes lengths.json beside it; six minutes, two quiet cores

The ceiling of a recipe counts multiply-adds. Products of few rows run at a lower rate on most machines, whoever asks
for them. So each layer of a recipe is given the time of an untouched layer on a prompt of that length, measured here
without tokenprune. Their sum is what the machine allows: with weights as PyTorch's own product takes them, and, for one
prompt, laid out beforehand (prepack.py).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cells import machine
from cpu import KEEPS, RECIPES
from prepack import prepack

from tokenprune.budget import tokens_per_layer
from tokenprune.builder import build
from tokenprune.models.load import quiet
from tokenprune.models.sketch import sketch_config, sketch_model
from tokenprune.recipe import load_recipe

HERE = Path(__file__).parent
LAYERS, WIDTH, VISION, TEXT = 10, 1024, 576, 64
ROUNDS = {1: 9, 4: 4}
"""By batch size."""


def lengths(name: str, keep: int) -> list[int]:
    """Tokens that enter each layer, text included."""
    pipeline = build(load_recipe(name, keep=keep), depth=LAYERS)
    counts = [count for count in pipeline.plan(VISION, [(1, 24, 24)]) if count is not None]
    return [n + TEXT for n in tokens_per_layer(pipeline.steps(), counts, LAYERS, VISION)]


@torch.inference_mode()
def seconds(text: Any, wanted: list[int], batch: int) -> dict[int, float]:
    """Median time of the whole decoder on `batch` prompts of each length; lengths take turns."""
    prompts = {n: torch.randn(batch, n, WIDTH) for n in wanted}
    taken: dict[int, list[float]] = {n: [] for n in wanted}
    for number in range(ROUNDS[batch] + 1):
        for n in wanted if number % 2 else reversed(wanted):
            start = time.perf_counter()
            text(inputs_embeds=prompts[n], use_cache=True)
            if number:
                taken[n].append(time.perf_counter() - start)
    return {n: statistics.median(times) for n, times in taken.items()}


def main() -> None:
    torch.set_num_threads(2)
    quiet()
    config = sketch_config("llava-1.5-7b", layers=LAYERS, width=WIDTH)
    model = sketch_model(config, dtype=torch.float32, device=torch.device("cpu"))
    made = {f"{name}/{keep}": lengths(name, keep) for name in RECIPES for keep in KEEPS}
    whole = VISION + TEXT
    out = HERE / "lengths.json"
    found = json.loads(out.read_text(encoding="utf-8"))["batches"] if out.exists() else {}
    wanted = sorted({whole, *(n for each in made.values() for n in each)})
    for key, batch in (("1", 1), ("4", 4), ("1 prepacked", 1)):
        if key.endswith("prepacked"):
            prepack(model)
        if key not in found:
            taken = seconds(model.model.language_model, wanted, batch)
            rate = {n: taken[whole] / whole / (taken[n] / n) for n in taken}
            possible = {name: taken[whole] / (sum(taken[n] for n in each) / LAYERS) for name, each in made.items()}
            found[key] = {"seconds": taken, "rate": rate, "possible": possible}
    facts = {"machine": machine(), "lengths": made, "batches": found}
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for batch, each in found.items():
        for n, rate in each["rate"].items():
            print(f"batch {batch}, {n:>4} tokens: {each['seconds'][n]:.3f} s, {rate:.2f} of the rate at {whole}")
        for name, ratio in each["possible"].items():
            print(f"batch {batch}, {name:<20} the machine allows a decoder {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
