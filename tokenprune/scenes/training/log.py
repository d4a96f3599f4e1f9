"""The log of a training run: one JSON line for every few steps.

In files a phase is called "stage", as in the log and the plan of the shipped run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.core.files import append_line, whole_file, whole_lines
from tokenprune.scenes.training.phases import PHASES
from tokenprune.scenes.training.trainer import Trainer

LOG_EVERY = 20


class Log:
    """The log file, with averages over `LOG_EVERY` steps a line; opening it cuts off what lies behind `trainer`.

    Args:
        path: of the file.
        trainer: where the run stands.
        state: of the log at that point, from `state_dict`.
    """

    def __init__(self, path: Path, trainer: Trainer, state: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._clear()
        if state is not None:
            self.parts.update(state["parts"])
            self.right.update(state["right"])
        # Steps after the last checkpoint run again: their lines would be there twice.
        lines = [line.decode() for line in whole_lines(path)]
        names = [phase.name for phase in PHASES]
        here = (trainer.phase_number, trainer.step)
        kept = [line for line in lines if (names.index((read := json.loads(line))["stage"]), read["step"]) <= here]
        with whole_file(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())

    def state_dict(self) -> dict[str, Any]:
        """What has been added since the last line: a checkpoint keeps it, so that no step is missing from averages."""
        return {"parts": dict(self.parts), "right": dict(self.right)}

    def _clear(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[bool]] = defaultdict(list)

    def add(self, trainer: Trainer, rate: float, parts: dict[str, float], right: dict[str, list[bool]]) -> None:
        """Take what `train_step` returned into the running averages, and write them when `LOG_EVERY` steps are full."""
        for name, value in parts.items():
            self.parts[name].append(value)
        for task, answers in right.items():
            self.right[task] += answers
        if trainer.step % LOG_EVERY and trainer.step != trainer.plan.steps[trainer.phase.name]:
            return
        line = {
            "stage": trainer.phase.name,
            "step": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "rate": round(rate, 6),
            "loss": {name: round(sum(v) / len(v), 4) for name, v in self.parts.items()},
            "accuracy": {task: round(sum(v) / len(v), 4) for task, v in sorted(self.right.items())},
        }
        append_line(self.path, json.dumps(line))
        self._clear()
