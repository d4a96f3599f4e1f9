"""`tokenprune eval`, packed against `generate`: processor time for a question of the embedded model, on one thread.

    python benchmarks/performance/packed.py            # writes packed.json beside it, a few minutes on one core
    python benchmarks/performance/packed.py --quick    # two scenes, to see that it runs; writes nothing

Every condition answers all questions about the same scenes in both ways, in batches of 32 questions and the same
process; the packed way has seen the pictures once before, as it has in any run of several conditions. Answers and token
counts must be equal.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from tokenprune.budget import Budget
from tokenprune.families.chat import Chat
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.evaluate import Case, Condition, make_conditions
from tokenprune.study.evaluate.askers import Asker, GenerateAsker
from tokenprune.study.evaluate.asking import ask
from tokenprune.study.evaluate.cost import Meter
from tokenprune.study.evaluate.packing import PackedAsker

SCENES, SIZE, KEEP = 20, 32, 0.33
RECIPES = ("fastv", "feather", "pyramiddrop", "sparsevlm")


def run(cases: list[Case], condition: Condition, asker: Asker) -> tuple[list[object], float]:
    """What came out for each case, and milliseconds of processor time for a question."""
    found: dict[int, object] = {}
    meter = Meter(asker.chat.model)
    start = time.process_time()
    for order in asker.batches(cases, SIZE):
        chosen = [cases[index] for index in order]
        totals = [144] * len(order)
        made = ask(asker, chosen, condition, meter=meter, totals=totals, max_new_tokens=32)
        found |= dict(zip(order, zip(made.answers, made.average, made.final, strict=True), strict=True))
    elapsed = time.process_time() - start
    return [found[index] for index in range(len(cases))], 1000 * elapsed / len(cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two scenes, writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    chat = Chat("embedded", *load_embedded())
    cases = scene_cases(2 if quick else SCENES)
    sharing, alike = PackedAsker(chat), GenerateAsker(chat)
    rows = {}
    conditions = make_conditions(RECIPES, [Budget("keep", KEEP)], draws=1)
    run(cases, conditions[0], sharing)
    for condition in conditions:
        together, packed = run(cases, condition, sharing)
        alone, generate = run(cases, condition, alike)
        if together != alone:
            sys.exit(f"{condition.label}: packed answers differ from those of generate")
        times = {
            "packed_ms": round(packed, 2),
            "generate_ms": round(generate, 2),
            "ratio": round(generate / packed, 2),
        }
        rows[condition.label] = times
        print(condition.label, times, flush=True)
    if quick:
        return
    facts = {
        "questions": len(cases),
        "pictures": SCENES,
        "batch": SIZE,
        "keep": KEEP,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
