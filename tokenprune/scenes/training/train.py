"""Train the embedded model from scratch on generated scenes.

    python -m tokenprune.scenes.training.train --out runs/scenes               # the shipped run: 51 minutes on one core
    python -m tokenprune.scenes.training.train --out runs/scenes --minutes 20  # shorter, in the same proportions
    python -m tokenprune.scenes.training.train --out runs/scenes --export  # latest checkpoint to runs/scenes/embedded

A run can be stopped at any time; the same command resumes it from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenprune.scenes.embedded import export
from tokenprune.scenes.training.alignment import Teacher
from tokenprune.scenes.training.batches import training_batch
from tokenprune.scenes.training.model import build_model
from tokenprune.scenes.training.muon import Muon
from tokenprune.scenes.training.phases import STAGES, Group, Stage, parameter_groups, stage_loss, text_loss
from tokenprune.scenes.training.positions import POSITIONS, position_table, read_positions
from tokenprune.scenes.training.texts import LAGS, texts

WARM_UP = 20
LOG_EVERY = 20
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What a run does, fixed when it starts and kept in `training.json`: resuming never changes it."""

    seed: int
    steps: dict[str, int]
    precision: str
    lags: str
    positions: str = "raster"


class Optimisers:
    """Muon for hidden matrices, AdamW for the rest, one learning rate schedule for both."""

    def __init__(self, stage: Stage, groups: list[Group]) -> None:
        self.stage = stage
        matrices = [{"params": group.matrices, "share": group.share} for group in groups]
        rest = [{"params": group.rest, "share": group.share} for group in groups]
        self.muon = Muon(matrices, lr=stage.rate)
        self.adam = torch.optim.AdamW(rest, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.parameters = [p for group in groups for p in (*group.matrices, *group.rest)]

    def rate(self, step: int, steps: int) -> float:
        """Warm-up, constant, then linear to `final`."""
        decay = min(1.0, (steps - step) / max(1.0, (1 - self.stage.hold) * steps))
        share = self.stage.final + (1 - self.stage.final) * decay
        return self.stage.rate * share * min(1.0, (step + 1) / WARM_UP)

    def step(self, step: int, steps: int) -> float:
        rate = self.rate(step, steps)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in (self.muon, self.adam):
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


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
        self.stage_number, self.step, self.seconds = 0, 0, 0.0
        self.optimisers = self._fresh_optimisers()

    @property
    def stage(self) -> Stage:
        return STAGES[self.stage_number]

    def _fresh_optimisers(self) -> Optimisers:
        groups = parameter_groups(self.stage, self.model, self.teacher)
        optimisers = Optimisers(self.stage, groups)
        used = {id(p) for p in optimisers.parameters}
        for parameter in [*self.model.parameters(), *self.teacher.parameters()]:
            parameter.requires_grad_(id(parameter) in used)
        return optimisers

    def next_stage(self) -> None:
        self.stage_number, self.step = self.stage_number + 1, 0
        if self.stage_number < len(STAGES):
            self.optimisers = self._fresh_optimisers()

    def train_step(self) -> tuple[float, dict[str, float], dict[str, list[bool]]]:
        """One optimiser step; returns the learning rate, losses by name and right answers by task."""
        stage = self.stage
        # Stages read different scenes of the stream, so that the decoder never meets one twice.
        first = self.stage_number * 100_000_000 + self.step * max(stage.batch, stage.texts)
        losses: list[torch.Tensor] = []
        parts: dict[str, float] = {}
        by_task: dict[str, list[bool]] = {}
        bf16 = self.plan.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            if stage.batch:
                loss, parts, by_task = self._scenes(first)
                losses.append(loss)
            if stage.texts and self.plan.lags != "none" and self.step % stage.text_every == 0:
                ids = torch.from_numpy(texts(self.plan.seed, first, stage.texts, self.plan.lags)).to(self.device)
                losses.append(text_loss(self.model, ids))
                parts["text"] = float(losses[-1].detach())
        torch.stack(losses).sum().backward()
        rate = self.optimisers.step(self.step, self.plan.steps[stage.name])
        self.step += 1
        return rate, parts, by_task

    def _scenes(self, first: int) -> tuple[torch.Tensor, dict[str, float], dict[str, list[bool]]]:
        """Loss of the scenes from number `first` on, its parts, and right answers by task."""
        stage = self.stage
        batch = training_batch(
            self.plan.seed,
            first,
            stage.batch,
            pixels=bool(stage.vision),
            count=stage.questions,
            captions=stage.captions,
            tallies=stage.tallies,
        )
        generator = torch.Generator().manual_seed(first)
        loss, parts, right = stage_loss(stage, self.model, self.teacher, batch, generator)
        by_task: dict[str, list[bool]] = defaultdict(list)
        for asked, answers in zip(batch.asked, right, strict=False):
            for question, answer in zip(asked, answers, strict=False):
                by_task[question.task].append(answer)
        return loss, parts, by_task

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage_number,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimisers": self.optimisers.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage_number, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.teacher.load_state_dict(state["teacher"])
        if self.stage_number < len(STAGES):
            self.optimisers = self._fresh_optimisers()
            self.optimisers.load_state_dict(state["optimisers"])


class Log:
    """Averages over `LOG_EVERY` steps, one JSON line each."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self.path = path
        self._clear()
        # Steps after the last checkpoint run again: their lines would be there twice.
        lines = path.read_text().splitlines() if path.exists() else []
        names = [stage.name for stage in STAGES]
        here = (trainer.stage_number, trainer.step)
        kept = [line for line in lines if (names.index((read := json.loads(line))["stage"]), read["step"]) <= here]
        path.write_text("".join(f"{line}\n" for line in kept))

    def _clear(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[bool]] = defaultdict(list)

    def add(self, trainer: Trainer, rate: float, parts: dict[str, float], right: dict[str, list[bool]]) -> None:
        for name, value in parts.items():
            self.parts[name].append(value)
        for task, answers in right.items():
            self.right[task] += answers
        if trainer.step % LOG_EVERY and trainer.step != trainer.plan.steps[trainer.stage.name]:
            return
        line = {
            "stage": trainer.stage.name,
            "step": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "rate": round(rate, 6),
            "loss": {name: round(sum(v) / len(v), 4) for name, v in self.parts.items()},
            "accuracy": {task: round(sum(v) / len(v), 4) for task, v in sorted(self.right.items())},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()


def make_plan(
    seed: int, precision: str, lags: str = "recent", steps: int | None = None, positions: str = "raster"
) -> Plan:
    """The steps of the shipped run, or `steps` in its proportions; without texts their stage has none."""
    factor = steps / sum(stage.steps for stage in STAGES) if steps else 1.0
    planned = {stage.name: max(1, round(stage.steps * factor)) for stage in STAGES}
    if lags == "none":
        planned |= {stage.name: 0 for stage in STAGES if not stage.batch}
    return Plan(seed, planned, precision, lags, positions)


def seconds_per_step(seed: int, precision: str, device: torch.device) -> float:
    """Mean over the stages of the shipped run, measured on this machine with a few steps of each."""
    trial = Trainer(make_plan(seed, precision), device)
    total = 0.0
    for stage in STAGES:
        trial.train_step()
        start = time.perf_counter()
        for _ in range(8):
            trial.train_step()
        total += (time.perf_counter() - start) / 8 * stage.steps
        trial.next_stage()
    return total / sum(stage.steps for stage in STAGES)


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint so that a run killed meanwhile keeps the previous one."""
    partial = path.with_suffix(".partial")
    torch.save(trainer.state_dict(), partial)
    os.replace(partial, path)


def run(trainer: Trainer, out: Path) -> None:
    """Train to the end of the plan, with a checkpoint every minute."""
    log, saved = Log(out / "training_log.jsonl", trainer), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        while trainer.stage_number < len(STAGES):
            stage, total = trainer.stage, trainer.plan.steps[trainer.stage.name]
            bar = progress.add_task(stage.name, total=total, completed=trainer.step)
            while trainer.step < total:
                start = time.perf_counter()
                rate, parts, right = trainer.train_step()
                trainer.seconds += time.perf_counter() - start
                log.add(trainer, rate, parts, right)
                progress.advance(bar)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save(trainer, out / "checkpoint.pt")
                    saved = time.monotonic()
            trainer.next_stage()
            save(trainer, out / "checkpoint.pt")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tokenprune.scenes.training.train", description="Train the embedded model."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and weights")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="aim at so many minutes on this machine")
    length.add_argument("--steps", type=int, help="total number of steps; default: those of the shipped run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 only where hardware has it")
    parser.add_argument("--text", choices=LAGS, default="recent", help="how far back the text stage repeats words")
    parser.add_argument("--positions", choices=POSITIONS, default="raster", help="position ids of vision tokens")
    parser.add_argument("--export", action="store_true", help="only write the weights of the latest checkpoint")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    plan_file, checkpoint = options.out / "training.json", options.out / "checkpoint.pt"
    if plan_file.exists():
        stored = json.loads(plan_file.read_text())
        plan = Plan(**{field.name: stored[field.name] for field in fields(Plan) if field.name in stored})
    else:
        steps = options.steps
        if options.minutes:
            steps = round(options.minutes * 60 / seconds_per_step(options.seed, options.precision, device))
        plan = make_plan(options.seed, options.precision, options.text, steps, options.positions)
        plan_file.write_text(json.dumps({**asdict(plan), "stages": [asdict(s) for s in STAGES]}, indent=1) + "\n")
    trainer = Trainer(plan, device)
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True))
    if not options.export:
        run(trainer, options.out)
    export(trainer.model, options.out / "embedded")


if __name__ == "__main__":
    main()
