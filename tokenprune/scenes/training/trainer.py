"""A run of the training on its way: the plan, the model and what has been learnt so far."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tokenprune.scenes.training.alignment import Teacher
from tokenprune.scenes.training.batches import training_batch
from tokenprune.scenes.training.model import build_model
from tokenprune.scenes.training.optimisers import Optimisers
from tokenprune.scenes.training.phases import PHASES, Phase, parameter_groups, phase_loss, text_loss
from tokenprune.scenes.training.positions import position_table, read_positions
from tokenprune.scenes.training.texts import texts


@dataclass(frozen=True)
class Plan:
    """What a run does: fixed when it starts and kept in `training.json`, so that resuming never changes it."""

    seed: int
    steps: dict[str, int]
    precision: str
    lags: str
    positions: str = "raster"


def make_plan(
    seed: int, precision: str, lags: str = "recent", steps: int | None = None, positions: str = "raster"
) -> Plan:
    """The steps of the shipped run, or `steps` in its proportions; without texts their phase has none."""
    factor = steps / sum(phase.steps for phase in PHASES) if steps else 1.0
    planned = {phase.name: max(1, round(phase.steps * factor)) for phase in PHASES}
    if lags == "none":
        planned |= {phase.name: 0 for phase in PHASES if not phase.batch}
    return Plan(seed, planned, precision, lags, positions)


class Trainer:
    """Model, teacher and position in the plan; `state_dict` is everything that resuming needs."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.model = build_model(seed=plan.seed).to(device).train()
        text, vision = self.model.config.text_config, self.model.config.vision_config
        if plan.positions != "raster":
            read_positions(self.model, position_table(plan.positions, text.max_position_embeddings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed + 1)
            self.teacher = Teacher(width=text.hidden_size, vision_width=vision.hidden_size).to(device)
        self.phase_number, self.step, self.seconds = 0, 0, 0.0
        self.optimisers = self._fresh_optimisers()

    @property
    def phase(self) -> Phase:
        """The phase that `train_step` trains."""
        return PHASES[self.phase_number]

    def _fresh_optimisers(self) -> Optimisers:
        groups = parameter_groups(self.phase, self.model, self.teacher)
        optimisers = Optimisers(self.phase, groups)
        used = {id(p) for p in optimisers.parameters}
        for parameter in [*self.model.parameters(), *self.teacher.parameters()]:
            parameter.requires_grad_(id(parameter) in used)
        return optimisers

    def next_phase(self) -> None:
        """Go to the start of the next phase; after the last one there is nothing left to train."""
        self.phase_number, self.step = self.phase_number + 1, 0
        if self.phase_number < len(PHASES):
            self.optimisers = self._fresh_optimisers()

    def train_step(self) -> tuple[float, dict[str, float], dict[str, list[bool]]]:
        """One optimiser step; returns the learning rate, losses by name and right answers by task."""
        phase = self.phase
        # Phases read different scenes of the stream, so that the decoder never meets one twice.
        first = self.phase_number * 100_000_000 + self.step * max(phase.batch, phase.texts)
        losses: list[torch.Tensor] = []
        parts: dict[str, float] = {}
        by_task: dict[str, list[bool]] = {}
        bf16 = self.plan.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            if phase.batch:
                loss, parts, by_task = self._scenes(first)
                losses.append(loss)
            if phase.texts and self.plan.lags != "none" and self.step % phase.text_every == 0:
                ids = torch.from_numpy(texts(self.plan.seed, first, phase.texts, self.plan.lags)).to(self.device)
                losses.append(text_loss(self.model, ids))
                parts["text"] = float(losses[-1].detach())
        torch.stack(losses).sum().backward()
        rate = self.optimisers.step(self.step, self.plan.steps[phase.name])
        self.step += 1
        return rate, parts, by_task

    def _scenes(self, first: int) -> tuple[torch.Tensor, dict[str, float], dict[str, list[bool]]]:
        """Loss of the scenes from number `first` on, its parts, and right answers by task."""
        phase = self.phase
        batch = training_batch(
            self.plan.seed,
            first,
            phase.batch,
            pixels=bool(phase.vision),
            count=phase.questions,
            captions=phase.captions,
            tallies=phase.tallies,
        )
        generator = torch.Generator().manual_seed(first)
        loss, parts, right = phase_loss(phase, self.model, self.teacher, batch, generator)
        by_task: dict[str, list[bool]] = defaultdict(list)
        for asked, answers in zip(batch.asked, right, strict=False):
            for question, answer in zip(asked, answers, strict=False):
                by_task[question.task].append(answer)
        return loss, parts, by_task

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase_number,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimisers": self.optimisers.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase_number, self.step, self.seconds = state["phase"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.teacher.load_state_dict(state["teacher"])
        if self.phase_number < len(PHASES):
            self.optimisers = self._fresh_optimisers()
            self.optimisers.load_state_dict(state["optimisers"])
