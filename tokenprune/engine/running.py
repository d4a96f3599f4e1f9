"""One stage before one decoder layer of a prefill: what it is given, and what becomes of the sequence."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.core.clock import Stopwatch
from tokenprune.core.stage_report import StageReport
from tokenprune.engine.cache import slots_of
from tokenprune.engine.layer_call import LayerCall
from tokenprune.engine.taps import Taps
from tokenprune.stage import Stage


def run_stage(number: int, stage: Stage, call: LayerCall, taps: Taps) -> tuple[Tensor, StageReport]:
    """Run a stage; the sequence is shorter afterwards, in `call.forward` and `call.prefill` too.

    Args:
        number: of the stage in its recipe.
        stage: to run.
        call: the layer that it acts before.
        taps: what earlier layers have computed.

    Returns:
        Hidden states ``[B, m, D]`` of what is left, and what to report.
    """
    forward, prefill, hidden = call.forward, call.prefill, call.hidden
    # One graph has no clock inside.
    watch = None if torch.compiler.is_compiling() else Stopwatch(hidden.device.type == "cuda")
    with nullcontext() if watch is None else watch.measure():
        prompt = prefill.prompt
        before = prompt.tokens.at_place(
            hidden,
            taps.attention(stage, call),
            taps.signals(stage, call),
            taps.question(stage, call),
            taps.glimpses.at(stage, call),
        )
        result = prefill.run(number, stage, before)
        tokens = result.tokens
        renumbers = stage.positions == "renumber"
        if tokens.sizes != before.sizes or result.written is not None or tokens.bias is not before.bias:
            if stage.skips:
                hidden = forward.skip(before, result, hidden, prefill.lengths)
            else:
                hidden, tokens, moved = forward.apply(before, result, hidden, prefill.lengths, renumber=renumbers)
                prefill.text = moved.gather(1, prefill.text)
                prefill.last = None if prefill.last is None else moved.gather(1, prefill.last)
        if renumbers:
            forward.renumber(prompt, hidden, slots_of(call.store))
        carried = prompt.tokens
        tokens = replace(tokens, attention=None, glimpse=None, signals=carried.signals, question=carried.question)
        prefill.prompt = replace(prompt, tokens=tokens)
    report = StageReport(
        name=stage.name,
        place=str(stage.place),
        layer=call.index if stage.place.in_decoder else None,
        left=tokens.origin,
        merged=result.merged,
        sizes=tokens.sizes,
        scores=result.scores,
        scored=before.origin,
        watch=watch,
        kv=stage.kv,
        dropped=stage.dropped,
    )
    return hidden, report
