"""One timed call of `generate`: time to the first token, time of the others, time of the method, peak memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.clock import Stopwatch
from tokenprune.core.report import Report
from tokenprune.errors import InputError
from tokenprune.families.catalogue import adapter_of


@dataclass(frozen=True)
class Sample:
    """One run. Seconds."""

    prefill: float
    """From the call to the first token."""
    vision: float
    """Vision tower and projector, which no recipe of the language model changes; part of `prefill`."""
    decode: float
    """All tokens after it."""
    method: float | None
    """What the recipe's stages took; part of `prefill`. None in a compiled prefill, which has no clock inside."""
    peak: int | None
    """Most bytes that were allocated on the device; None on a CPU, where nobody counts."""

    @property
    def language(self) -> float:
        """The prefill without the vision tower: what a recipe acts on."""
        return self.prefill - self.vision

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class VisionClock:
    """Times the vision tower and projector of a model from now on: on a GPU by events, which wait for nothing."""

    def __init__(self, model: Any) -> None:
        self.modules = adapter_of(model, asker="bench").vision_modules(model.base_model)
        self.watch = Stopwatch(model.device.type == "cuda")
        self._start: Any = None
        self._handles: list[Any] = []

    def __enter__(self) -> VisionClock:
        for module in self.modules:
            self._handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> float:
        """Seconds since the last call. Waits for the device."""
        seconds = self.watch.seconds
        self.watch.spans.clear()
        return seconds

    def _enter(self, module: Any, args: Any) -> None:
        self._start = self.watch.now()

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.watch.spans.append((self._start, self.watch.now()))


class FirstToken:
    """A stopping criterion that never stops: `generate` calls it behind every token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = 0
        self.first = 0.0

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        self.calls += 1
        if self.calls == 1:  # later tokens need not be waited for one by one
            wait(self.device)
            self.first = time.perf_counter()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def timed(
    model: Any, inputs: dict[str, Tensor], new_tokens: int, *, vision: VisionClock, report: Report | None = None
) -> Sample:
    """Generate exactly `new_tokens` greedily, and tell how long it took.

    Args:
        model: what generates.
        inputs: of the prompt.
        new_tokens: tokens to generate.
        vision: runs on the model.
        report: of an attached recipe.

    Raises:
        InputError: the model made another number of tokens.
    """
    device = inputs["input_ids"].device
    clock = FirstToken(device)
    cuda = device.type == "cuda"
    vision.seconds()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    wait(device)
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    wait(device)
    stop = time.perf_counter()
    made = ids.shape[1] - inputs["input_ids"].shape[1]
    if made != new_tokens or clock.calls != new_tokens:
        raise InputError(f"bench: asked for {new_tokens} tokens, the model made {made}")
    return Sample(
        prefill=clock.first - start,
        vision=vision.seconds(),
        decode=stop - clock.first if new_tokens > 1 else 0.0,
        method=0.0 if report is None else None if math.isnan(report.seconds) else report.seconds,
        peak=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def wait(device: torch.device) -> None:
    """Block until the device has done all work that was queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
