"""What the engine tests share: running a model with a recipe on, and by the masked reference of what the recipe did."""

from __future__ import annotations

from typing import Any

from families import CACHE, next_turn, vision_mask
from reference import generate_logits, masked_reference
from torch import Tensor

import tokenprune as tp
from tokenprune.core.report import Report
from tokenprune.engine.traces import pre_hook
from tokenprune.testing.runs import TOLERANCE as TOLERANCE
from tokenprune.testing.runs import logits_of as logits_of
from tokenprune.testing.runs import reference_stages as reference_stages
from tokenprune.testing.runs import run_both as run_both
from tokenprune.testing.runs import snapshot as snapshot
from tokenprune.testing.runs import stage_results as stage_results
from tokenprune.testing.runs import worst as worst

Turns = tuple[Tensor, tuple[Tensor, ...]]
"""Sequences of a first turn, and logits of each step of the answer in a second."""


def two_turns(model: Any, batch: Any, asked: Any) -> tuple[Turns, Turns, Report]:
    """A second turn of text on the cache of the first: under a recipe, and by the masked reference of what it did."""

    def turns() -> Turns:
        first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        following = next_turn(batch, first.sequences)
        return first.sequences, generate_logits(model, {**following, CACHE: first[CACHE]})[1]

    with tp.attach(model, asked) as attached, stage_results(attached) as results:
        got = turns()
        stages = reference_stages(attached.report, results)
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        return got, turns(), attached.report


def entering(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, L, D]`` that enter the decoder, and hidden states ``[B, m, D]`` that enter its first layer."""
    seen: list[Tensor] = []
    hooks = [
        pre_hook(model.get_decoder(), lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"])),
        pre_hook(model.get_decoder().layers[0], lambda module, args, kwargs: seen.append(args[0])),
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]
