"""What a learned request is worth on the embedded model, beside chance, its untrained self, and the first token.

    tokenprune fit visionthink --variant pooled --scenes 300 --batch 64 --seed 1 --output runs/request-1
    tokenprune fit visionthink --variant pooled --scenes 300 --batch 64 --seed 2 --output runs/request-2
    python benchmarks/methods/request.py --fits runs/request-1/visionthink.yaml runs/request-2/visionthink.yaml

Each held-out question is asked once with the first pass and once with everything, which decides every trigger. The
shipped request (`visionthink`, variant `trained`), and those of `--fits`, ask for as many questions as they do. With as
many requests, and so at the same cost but for the head's own, stand beside each: asking by chance (the same share of
either answer), the first token (`below`, the threshold chosen on these very questions to ask for that many), and one
pass of `pool`, its budget set to the multiply-adds that both passes came to. Untrained, a request never asks: the first
pass alone. Intervals are bootstrapped over pictures, and paired. Scenes begin at 100, as the batch of the fit was
chosen with the first 80 in sight. Writes `request.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import tokenprune as tp
from tokenprune.core.files import whole_file
from tokenprune.families.chat import Chat
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import difference
from tokenprune.study.statistics import accuracy, holm, sign_flip
from tokenprune.twice import full_pass, last_state, one_pass


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--fits", type=Path, nargs="*", default=[], help="recipes with a request of their own")
    made.add_argument("--scenes", type=int, default=80)
    made.add_argument("--first", type=int, default=100, help="number of the first held-out scene")
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("request.json"))
    options = made.parse_args()
    torch.set_num_threads(1)
    chat, cases = tp.load("embedded"), scene_cases(options.scenes, first=options.first)
    pictures = [case.picture_id for case in cases]
    shipped = load_recipe("visionthink", variant="trained")
    states, sure, small, full, costs = _asked(chat, cases, shipped)
    rows, pool = [], _Pool(chat, cases, costs[:, 1].sum())
    for recipe in (shipped, *map(load_recipe, options.fits)):
        head, again = recipe.build_request(), recipe.again
        assert head is not None and again is not None
        with torch.inference_mode():
            asks = head(states).sigmoid().numpy() > again.above
        count = int(asks.sum())
        unsure = np.zeros(len(cases), bool)
        unsure[np.argsort(sure, kind="stable")[:count]] = True
        right = np.where(asks, full, small)
        cost = (costs[:, 0].sum() + head.products * len(cases) + costs[asks, 1].sum()) / costs[:, 1].sum()
        once, once_cost = pool.right(cost)
        beside = {
            "untrained": small,
            "chance": asks.mean() * full + (1 - asks.mean()) * small,
            "first_token": np.where(unsure, full, small),
            "pool": once,
        }
        rows.append(
            {
                "recipe": recipe.again.weights,
                "asked_again": asks.mean(),
                "accuracy": accuracy(right, pictures).to_dict(),
                "multiply_adds": cost,
                "pool_multiply_adds": once_cost,
                "below": float(np.sort(sure)[count]),
                "beside": {
                    name: {
                        "accuracy": other.mean(),
                        "more": difference(right, other, pictures).to_dict(),
                        "p": sign_flip(right, other, pictures),
                    }
                    for name, other in beside.items()
                },
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    pairs = [pair for row in rows for pair in row["beside"].values()]
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p
    about = {
        "questions": len(cases),
        "scenes": [options.first, options.first + options.scenes],
        "first_accuracy": small.mean(),
        "full_accuracy": full.mean(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "requests": rows,
    }
    with whole_file(options.out) as file:
        file.write((json.dumps(about, indent=1) + "\n").encode())


def _asked(chat: Chat, cases: list[Case], recipe: Recipe) -> tuple[torch.Tensor, Any, Any, Any, Any]:
    """Of each question: what a request reads, how sure the first token is, who is right, and what both passes cost."""
    states, rows, costs = [], [], []
    for case in cases:
        inputs = chat.inputs([case.picture()], case.question)
        with last_state(chat.model) as state:
            first = one_pass(chat, inputs, recipe.first_pass, "first", 12)
        states.append(state())
        everything = full_pass(chat, inputs, 12)
        rows.append((first.probability, case.right(first.text), case.right(everything.text)))
        costs.append((first.multiply_adds, everything.multiply_adds))
    sure, small, full = (np.array(column, float) for column in zip(*rows, strict=True))
    return torch.cat(states), sure, small, full, np.array(costs, float)


class _Pool:
    """One pass of `pool` over the questions, at shares of the untouched multiply-adds."""

    def __init__(self, chat: Chat, cases: list[Case], whole: float) -> None:
        self._chat, self._cases, self._whole = chat, cases, whole
        self._known: dict[float, tuple[Any, float]] = {}

    def right(self, share: float) -> tuple[Any, float]:
        """Who is right, and the share that it came to."""
        share = round(share, 4)
        if share not in self._known:
            recipe, rows = load_recipe("pool", flops=share), []
            for case in self._cases:
                inputs = self._chat.inputs([case.picture()], case.question)
                made = one_pass(self._chat, inputs, recipe, "full", 12)
                rows.append((case.right(made.text), made.multiply_adds))
            right, paid = (np.array(column, float) for column in zip(*rows, strict=True))
            self._known[share] = right, paid.sum() / self._whole
        return self._known[share]


if __name__ == "__main__":
    main()
