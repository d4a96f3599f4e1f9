"""What the running forward of each thread knows, so that several threads may run one attached model at once.

A forward never changes its thread, and a thread runs one forward at a time. So whatever belongs to a forward stands in
an object of its thread, and no thread waits for another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor

from tokenprune.core.signals import Signal
from tokenprune.core.stage_report import StageReport
from tokenprune.engine.asked import Asked
from tokenprune.engine.chunks import Chunk
from tokenprune.engine.forward import Forward
from tokenprune.engine.passed import Passed
from tokenprune.engine.projections import LayerInput
from tokenprune.engine.prompt import Prefill
from tokenprune.engine.vision_run import Pictured
from tokenprune.families.anatomy import Pictures


class State:
    """One thread's forward, and the `generate` call that it belongs to."""

    def __init__(self) -> None:
        self.limit: int | None = None
        """Length of the prompt of the running `generate` call: nothing behind it may rate."""
        self.pictures = Pictures()
        """What it was told of its pictures: `generate` may run the tower by itself, and give the base model none."""
        self.chunked = False
        """Whether that prompt comes in several forwards: none but the last reaches its length."""
        self.asked: Asked | None = None
        """What the running call of the model asks of places in its prompt."""
        self.told: Tensor | None = None
        """``[B, L]`` bool, vision tokens of prompts that come as embeddings, where the caller has said so."""
        self.tower = Pictured()
        """What the vision tower has computed for the prompts of this thread."""
        self.needs_hooks = False
        """Whether this forward needs the hooks of the layers: no other thread may take them off then."""
        self.close()

    def close(self) -> None:
        """Forget what belongs to a forward that is over."""
        self.input_ids: Tensor | None = None
        """``[B, L]``, from the base model's call."""
        self.attention_mask: Any = None
        self.vision: Tensor | None = None
        """``[B, L]``, vision tokens of a prompt without ids: told, or found by their placeholders (`vision_kinds`)."""
        self.text_only = False
        """Whether somebody has said that no vision tokens come."""
        self.sure = False
        """Whether the caller has said which they are."""
        self.shown = Pictures()
        """What is told of this forward's pictures."""
        self.waiting: Chunk | None = None
        """The chunk that the text model was called with, and is not to run."""
        self.forward: Forward | None = None
        self.prefill: Prefill | None = None
        self.locate: Callable[[], Prefill | None] | None = None
        """Finds the prefill, when a layer first asks."""
        self.ran: list[StageReport] | None = None
        self.inputs: dict[int, LayerInput] = {}
        """What entered the layers that ran last, of those whose queries and keys are tapped (`Taps.previous`)."""
        self.passed: list[Passed] = []
        """The layers that have run, from the first on, where a stage asks for a glimpse behind the prompt."""
        self.hidden: dict[int, Signal] = {}
        """The vision tokens' hidden states that entered the layers of `Taps.earlier`."""
        self.needs_hooks = False


class Threads:
    """The `State` of each thread; it goes when its thread does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while hooks of the layers come or go."""
        self._every: WeakSet[State] = WeakSet()
        self._local = _Local(self._enter)

    @property
    def now(self) -> State:
        """The state of the calling thread."""
        return self._local.now

    def others_need_hooks(self) -> bool:
        """Whether the forward of another thread needs the hooks of the layers. Ask with `lock` held."""
        now = self.now
        return any(state.needs_hooks for state in self._every if state is not now)

    def _enter(self, state: State) -> None:
        with self.lock:
            self._every.add(state)


class _Local(threading.local):
    """Python runs the constructor once more in each thread that looks at an attribute."""

    def __init__(self, enter: Callable[[State], None]) -> None:
        self.now = State()
        enter(self.now)
