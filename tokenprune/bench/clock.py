"""One timed call of `generate`: time to the first token, time of the others, time of the method, peak memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.report import Report


@dataclass(frozen=True)
class Sample:
    """One run. Seconds."""

    prefill: float
    """From the call to the first token."""
    decode: float
    """All tokens after it."""
    method: float
    """What the recipe's stages took; part of `prefill`."""
    peak: int | None
    """Most bytes that were allocated on the device; None on a CPU, where nobody counts."""

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class _Clock:
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


def timed(model: Any, inputs: dict[str, Tensor], new_tokens: int, report: Report | None = None) -> Sample:
    """Generate exactly `new_tokens` greedily, and tell how long it took; `report` is that of an attached recipe.

    Raises:
        InputError: the model made another number of tokens.
    """
    device = inputs["input_ids"].device
    clock = _Clock(device)
    cuda = device.type == "cuda"
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
        decode=stop - clock.first if new_tokens > 1 else 0.0,
        method=0.0 if report is None else report.seconds,
        peak=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
