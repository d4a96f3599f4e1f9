"""A stopwatch that never makes a GPU wait while it measures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Time spent inside `measure` blocks: on a GPU by events, so that measuring never waits for the device."""

    cuda: bool
    spans: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The time of the block counts."""
        start = self.now()
        yield
        self.spans.append((start, self.now()))

    def now(self) -> Any:
        """A mark for `spans`: on a GPU an event, which is recorded when the work queued so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """Seconds in all blocks so far. Waits for the device."""
        if not self.cuda:
            return float(sum(stop - start for start, stop in self.spans))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self.spans) / 1000
