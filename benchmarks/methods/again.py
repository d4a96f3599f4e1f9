"""What asking again is worth on the embedded model: accuracy and cost of `visionthink`, pooled, by its threshold.

    python benchmarks/methods/again.py --scenes 40

Each held-out question is asked once with the first pass and once with everything, which decides every threshold. Beside
each stands what asking again by chance, as often, would give: on average the same share of either. A trigger that is
not above that knows nothing. At the thresholds of `--pool` it is also compared with one pass of `pool`, its budget set
to the multiply-adds that both passes came to. Multiply-adds are of prefills; intervals are bootstrapped over pictures.
Writes `again.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

import tokenprune as tp
from tokenprune.core.files import whole_file
from tokenprune.recipe import load_recipe
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.evaluate import difference
from tokenprune.twice import full_pass, one_pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--keep", type=float, default=0.25, help="of the first pass")
    parser.add_argument("--below", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
    parser.add_argument(
        "--pool", type=float, nargs="*", default=[0.5, 0.8, 0.9], help="thresholds to compare with pool"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("again.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chat = tp.load("embedded")
    first = load_recipe("visionthink", variant="pooled", keep=options.keep).first_pass
    cases = scene_cases(options.scenes)
    rows = []
    for case in cases:
        inputs = chat.inputs([case.picture()], case.question)
        small, full = one_pass(chat, inputs, first, "first", 12), full_pass(chat, inputs, 12)
        rows.append(
            (small.probability, case.right(small.text), case.right(full.text), small.multiply_adds, full.multiply_adds)
        )
    sure, small_right, full_right, small_cost, full_cost = (
        np.array(column, float) for column in zip(*rows, strict=True)
    )
    pictures = [case.picture_id for case in cases]
    results = []
    for below in options.below:
        again = sure < below
        right = np.where(again, full_right, small_right)
        chance = again.mean() * full_right + (1 - again.mean()) * small_right
        results.append(
            {
                "below": below,
                "asked_again": again.mean(),
                "accuracy": right.mean(),
                "multiply_adds": (small_cost.sum() + full_cost[again].sum()) / full_cost.sum(),
                "more_than_by_chance": difference(right, chance, pictures).to_dict(),
            }
        )
        if below in options.pool:
            pool, once = load_recipe("pool", flops=round(results[-1]["multiply_adds"], 4)), []
            for case in cases:
                made = one_pass(chat, chat.inputs([case.picture()], case.question), pool, "full", 12)
                once.append((case.right(made.text), made.multiply_adds))
            pool_right, pool_cost = (np.array(column, float) for column in zip(*once, strict=True))
            results[-1]["pool"] = {
                "accuracy": pool_right.mean(),
                "multiply_adds": pool_cost.sum() / full_cost.sum(),
                "more_than_pool": difference(right, pool_right, pictures).to_dict(),
            }
        print(json.dumps(results[-1]), flush=True)
    about = {
        "questions": len(cases),
        "scenes": options.scenes,
        "keep": options.keep,
        "first_accuracy": small_right.mean(),
        "full_accuracy": full_right.mean(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    with whole_file(options.out) as file:
        file.write((json.dumps(about, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
