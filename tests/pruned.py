"""What the engine tests share: run a model with a recipe on, and the masked reference of what the recipe did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from families import vision_mask
from reference import Stage, generate_logits, masked_reference
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.core.report import Report
from tokenprune.stage import StageResult

TOLERANCE = 1e-5


@contextmanager
def stage_results(attached: tp.Attached) -> Iterator[list[StageResult]]:
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


def reference_stages(report: Report, results: Sequence[StageResult], rows: slice = slice(None)) -> list[Stage]:
    """What the report says that the stages did, and what they wrote, for the masked reference; `rows` undoes beams."""
    stages = []
    for stage, result in zip(report.stages, results, strict=False):
        tokens, written = result.tokens, result.written
        anchors = states = bias = None
        if written is not None:
            at = written.clamp(min=0)
            anchors = tokens.origin.gather(1, at).masked_fill(written < 0, -1)[rows]
            states = tokens.hidden.gather(1, at[..., None].expand(-1, -1, tokens.hidden.shape[-1]))[rows]
        if tokens.bias is not None:
            full = torch.zeros(tokens.bias.shape[0], 1 + max(tokens.total))
            bias = full.scatter(1, tokens.origin + 1, tokens.bias)[rows, 1:]  # padding has origin -1
        stages.append(Stage(stage.layer, stage.kept[rows], anchors, states, bias))
    return stages


def run_both(
    model: Any, batch: Mapping[str, Any], recipe: Any, *, expand: int = 1, **options: Any
) -> tuple[float, tuple[Tensor, Tensor], Report]:
    """Generate with the recipe on, and by the masked reference: worst difference of logits, sequences, report."""
    with tp.attach(model, recipe) as attached, stage_results(attached) as results:
        sequences, logits = generate_logits(model, batch, **options)
    stages = reference_stages(attached.report, results, slice(None, None, expand))
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        expected, expected_logits = generate_logits(model, batch, **options)
    return worst(logits, expected_logits), (sequences, expected), attached.report


def worst(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    assert len(first) == len(second)
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(first, second, strict=True))


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
    return model(**batch, **options).logits


def snapshot(model: nn.Module) -> list[tuple[str, Any]]:
    """Names of everything an instance carries, and its numbers of hooks."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [
        (name, sorted(vars(module)), [len(getattr(module, h)) for h in hooks]) for name, module in model.named_modules()
    ]
