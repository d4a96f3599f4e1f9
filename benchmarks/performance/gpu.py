"""GPU targets: LLaVA-1.5-7B and Qwen2.5-VL-7B shapes, bfloat16, random weights, to 16k vision tokens, batch 1 and 8.

    python benchmarks/performance/gpu.py             # writes gpu.json beside it; stops before ten minutes
    python benchmarks/performance/gpu.py --quick     # toy sizes, on a CPU too, to see that it runs

Cells come in order of importance; one that does not fit in memory or in the time is recorded as skipped, with the
reason, and the next call of the command tries it again. What is there is not measured again. Recipes keep a quarter of
the vision tokens. In the same rounds runs the untouched model with its sequence simply cut to the same lengths
(cut.py), which is what the machine allows any method. See docs/performance.md for a machine without internet.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from cells import Results, compare
from transformers import PreTrainedModel

from tokenprune.errors import InputError
from tokenprune.families.load import quiet
from tokenprune.families.sketch import sketch_config, sketch_model
from tokenprune.recipe import load_recipe

KEEP = 0.25
NEW_TOKENS = 17
ROUNDS, HEAVY_ROUNDS, HEAVY = 5, 3, 16_000
"""Timed rounds; the fewer ones from so many vision tokens in a batch on."""
RECIPES = ("fastv", "sparsevlm-v1.5", "feather")
SLOW = ("qwen2.5-vl-7b", 16384, 8)
"""The tower alone takes ten seconds there, its windows one by one: one recipe."""
COMPILE: dict[str, Any] = {"eager": False, "compiled": True, "recorded": {"mode": "reduce-overhead"}}
"""Compiled: the prefill alone. Recorded: CUDA graphs for decoding. Both take longer to compile than to measure, and so
have one recipe."""
CELLS: tuple[tuple[str, int, int, str], ...] = (
    ("llava-1.5-7b", 576, 1, "eager"),
    ("llava-1.5-7b", 2880, 1, "eager"),
    ("llava-1.5-7b", 2880, 8, "eager"),
    ("llava-1.5-7b", 16128, 1, "eager"),
    ("llava-1.5-7b", 576, 8, "eager"),
    ("llava-1.5-7b", 2880, 1, "compiled"),
    ("qwen2.5-vl-7b", 576, 1, "eager"),
    ("qwen2.5-vl-7b", 2880, 1, "eager"),
    ("qwen2.5-vl-7b", 2880, 8, "eager"),
    ("qwen2.5-vl-7b", 16384, 1, "eager"),
    ("qwen2.5-vl-7b", 576, 8, "eager"),
    ("qwen2.5-vl-7b", 2880, 1, "compiled"),
    ("llava-1.5-7b", 2880, 1, "recorded"),
    ("llava-1.5-7b", 16128, 8, "eager"),
    ("qwen2.5-vl-7b", 16384, 8, "eager"),
)
"""Model, vision tokens, batch, and how it runs."""
QUICK = tuple(dict.fromkeys((name, 576, 1, how) for name, _, _, how in CELLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, into a temporary folder")
    parser.add_argument("--minutes", type=float, default=6.0, help="start no cell after so long; one takes up to 4")
    parser.add_argument("--eager", action="store_true", help="leave compiled cells out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of gpu.json")
    options = parser.parse_args()
    if not (options.quick or torch.cuda.is_available()):
        parser.error("no GPU here; --quick shows on a CPU that the script runs")
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = {"layers": 4, "width": 256} if options.quick else {}
    settings = {"dtype": "bfloat16", "text": 64, "new_tokens": NEW_TOKENS, "keep": KEEP, **scale}
    results = Results((Path(mkdtemp()) if options.quick else options.output) / "gpu.json", settings)
    made: dict[str, Any] = {}
    quiet()
    for name, tokens, batch, how in QUICK if options.quick else CELLS:
        if options.eager and how != "eager":
            continue

        def run(name: str = name, tokens: int = tokens, batch: int = batch, how: str = how) -> Any:
            if (time.perf_counter() - begin) / 60 > options.minutes:
                raise InputError(f"out of time: {options.minutes:g} minutes")
            if name not in made:
                made.clear()
                made[name] = sketch_model(sketch_config(name, **scale), dtype=torch.bfloat16, device=device)
            rounds = 1 if options.quick else ROUNDS if tokens * batch < HEAVY else HEAVY_ROUNDS
            recipes = RECIPES[:1] if how != "eager" or (name, tokens, batch) == SLOW else RECIPES
            return _measured(made[name], recipes, tokens, batch, how, rounds)

        results.add(f"{name}/{tokens}/{batch}/{how}", run)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _report(results)


def _measured(
    model: PreTrainedModel, recipes: tuple[str, ...], tokens: int, batch: int, how: str, rounds: int
) -> list[dict[str, Any]]:
    return compare(
        model,
        {name: load_recipe(name, keep=KEEP) for name in recipes},
        tokens=tokens,
        text=64,
        batch=batch,
        new_tokens=1 if how == "compiled" else NEW_TOKENS,
        rounds=rounds,
        compile=COMPILE[how],
        limits=() if how == "recorded" else ("prefill", "language"),
        cache=how == "eager",
    )


def _report(results: Results) -> None:
    for cell, found in results.cells.items():
        for row in found.get("rows", [])[1:]:
            whole, alone = row["reached"]["prefill"], row["reached"]["language"]
            decode = (row["speedup"]["decode"] or {"value": math.nan})["value"]
            method = math.nan if row["method_share"] is None else row["method_share"]
            limit = row.get("machine")
            free = "" if limit is None else f", of a free method {limit['prefill']['reached']['value']:.2f}"
            print(
                f"{cell:<32} {row['name']:>15}  prefill {row['speedup']['prefill']['value']:.2f}×, reached {whole:.2f} "
                f"(without the tower {alone:.2f}){free}, method {method:.1%}, decode {decode:.2f}×, "
                f"KV {row['kv_share']:.1%}"
            )


if __name__ == "__main__":
    main()
