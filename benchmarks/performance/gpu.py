"""GPU targets: LLaVA-1.5-7B and Qwen2.5-VL-7B shapes, bfloat16, random weights, to 16k vision tokens, batch 1 and 8.

    python benchmarks/performance/gpu.py             # writes gpu.json beside it; stops before ten minutes
    python benchmarks/performance/gpu.py --quick     # toy sizes, on a CPU too, to see that it runs

Cells come in order of importance; one that does not fit in memory or in the time is recorded as skipped, with the
reason, and the next call of the command tries it again. What is there is not measured again. See docs/performance.md
for a machine without internet.
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

from tokenprune.errors import InputError
from tokenprune.models.load import quiet
from tokenprune.models.sketch import sketch_config, sketch_model
from tokenprune.recipe import load_recipe

RECIPES = {name: load_recipe(name, keep=0.25) for name in ("fastv", "sparsevlm-v1.5", "feather")}
CELLS: tuple[tuple[str, int, int, bool], ...] = (
    ("llava-1.5-7b", 576, 1, False),
    ("llava-1.5-7b", 2880, 1, False),
    ("llava-1.5-7b", 2880, 8, False),
    ("llava-1.5-7b", 2880, 1, True),
    ("llava-1.5-7b", 576, 8, False),
    ("llava-1.5-7b", 16128, 1, False),
    ("qwen2.5-vl-7b", 576, 1, False),
    ("qwen2.5-vl-7b", 2880, 1, False),
    ("qwen2.5-vl-7b", 2880, 8, False),
    ("qwen2.5-vl-7b", 16384, 1, False),
    ("qwen2.5-vl-7b", 2880, 1, True),
    ("qwen2.5-vl-7b", 576, 8, False),
    ("llava-1.5-7b", 16128, 8, False),
    ("qwen2.5-vl-7b", 16384, 8, False),
)
"""Model, vision tokens, batch, compiled?"""
QUICK = tuple(dict.fromkeys((name, 576, 1, compiled) for name, _, _, compiled in CELLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, into a temporary folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after so long")
    parser.add_argument("--eager", action="store_true", help="leave compiled cells out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of gpu.json")
    options = parser.parse_args()
    if not (options.quick or torch.cuda.is_available()):
        parser.error("no GPU here; --quick shows on a CPU that the script runs")
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = {"layers": 4, "width": 256} if options.quick else {}
    rounds, new_tokens, text = (1, 2, 40) if options.quick else (5, 17, 64)
    settings = {"dtype": "bfloat16", "text": text, "new_tokens": new_tokens, "rounds": rounds, "keep": 0.25, **scale}
    results = Results((Path(mkdtemp()) if options.quick else options.output) / "gpu.json", settings)
    made: dict[str, Any] = {}
    quiet()
    for name, tokens, batch, compiled in QUICK if options.quick else CELLS:
        if compiled and options.eager:
            continue

        def run(name: str = name, tokens: int = tokens, batch: int = batch, compiled: bool = compiled) -> Any:
            if (time.perf_counter() - begin) / 60 > options.minutes:
                raise InputError(f"out of time: {options.minutes:g} minutes")
            if name not in made:
                made.clear()
                made[name] = sketch_model(sketch_config(name, **scale), dtype=torch.bfloat16, device=device)
            # Compiling takes longer than all the rest: one recipe, and the prefill alone.
            recipes, new = ({"fastv": RECIPES["fastv"]}, 1) if compiled else (RECIPES, new_tokens)
            size = {"tokens": tokens, "text": text, "batch": batch, "new_tokens": new, "compile": compiled}
            return compare(made[name], recipes, rounds=rounds if tokens * batch < 100_000 else 3, **size)

        results.add(f"{name}/{tokens}/{batch}/{'compiled' if compiled else 'eager'}", run)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for cell, found in results.cells.items():
        for row in found.get("rows", [])[1:]:
            whole, alone = row["reached"]["prefill"], row["reached"]["language"]
            decode = (row["speedup"]["decode"] or {"value": math.nan})["value"]
            method = math.nan if row["method_share"] is None else row["method_share"]
            print(
                f"{cell:<32} {row['name']:>15}  prefill {row['speedup']['prefill']['value']:.2f}×, reached {whole:.2f} "
                f"(without the tower {alone:.2f}), method {method:.1%}, decode {decode:.2f}×, "
                f"KV {row['kv_share']:.1%}"
            )


if __name__ == "__main__":
    main()
