"""Running a model with a recipe on, and by the masked reference of what the recipe did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.report import Report
from tokenprune.engine.attach import Attached, attach
from tokenprune.families.adapter import Adapter
from tokenprune.stage import StageResult
from tokenprune.testing.reference import Hidden, masked_reference, vision_mask

TOLERANCE = 1e-5
"""Between logits in float32 that should be equal."""


def generate_logits(
    model: Any, inputs: Mapping[str, Any], *, seed: int = 0, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sequences [B * answers, L + new] and the raw logits of each step, [B * beams, V]; same seed, same samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 6, "do_sample": False} | options
        output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, output.logits


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
    """Logits [B, L, V] of one forward."""
    logits: Tensor = model(**batch, **options).logits
    return logits


@contextmanager
def stage_results(attached: Attached) -> Iterator[list[StageResult]]:
    """What each stage made of its tokens, in the order in which they ran."""
    results: list[StageResult] = []
    handles = [
        stage.register_forward_hook(lambda module, args, result: results.append(result))
        for stage in attached.engine.pipeline.stages
    ]
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()


def reference_stages(report: Report, results: Sequence[StageResult], rows: slice = slice(None)) -> list[Hidden]:
    """What the report says that the stages did, and what they wrote, for the masked reference; `rows` undoes beams."""
    stages = []
    for stage, result in zip(report.stages, results, strict=False):
        tokens, written = result.tokens, result.written
        anchors = states = bias = None
        if written is not None:
            at = written.clamp(min=0)
            anchors = tokens.origin.gather(1, at).masked_fill(written < 0, -1)[rows]
            states = tokens.hidden.gather(1, at[..., None].expand(-1, -1, tokens.hidden.shape[-1]))[rows]
        if tokens.bias is not None and not stage.skips:  # which leaves those of earlier stages as they are
            full = torch.zeros(tokens.bias.shape[0], 1 + max(tokens.total))
            bias = full.scatter(1, tokens.origin + 1, tokens.bias)[rows, 1:]  # padding has origin -1
        everywhere = stage.kv == "all_layers"
        stages.append(Hidden(stage.layer, stage.kept[rows], anchors, states, bias, everywhere, stage.skips))
    return stages


def run_both(
    model: Any,
    batch: Mapping[str, Any],
    recipe: Any,
    *,
    expand: int = 1,
    adapter: Adapter | None = None,
    **options: Any,
) -> tuple[float, tuple[Tensor, Tensor], Report]:
    """Generate with the recipe on, and by the masked reference: worst difference of logits, sequences, report.

    Args:
        model: a transformers model.
        batch: what it is called with.
        recipe: as `attach` takes it.
        expand: rows that `generate` makes of one (beams, answers).
        adapter: as `attach` takes it.
        options: of `generate`.
    """
    with attach(model, recipe, adapter=adapter) as attached, stage_results(attached) as results:
        sequences, logits = generate_logits(model, batch, **options)
    stages = reference_stages(attached.report, results, slice(None, None, expand))
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        expected, expected_logits = generate_logits(model, batch, **options)
    return worst(logits, expected_logits), (sequences, expected), attached.report


def worst(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    """The largest difference between the logits of two answers."""
    if len(first) != len(second):
        return float("inf")
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(first, second, strict=True))


def snapshot(model: nn.Module) -> list[tuple[str, Any]]:
    """Names of everything an instance carries, and its numbers of hooks."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [
        (name, (sorted(vars(module)), [len(getattr(module, h)) for h in hooks]))
        for name, module in model.named_modules()
    ]
