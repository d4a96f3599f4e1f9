"""Train the embedded model from scratch on generated scenes.

    python -m tokenprune.scenes.training.train --out runs/scenes               # the shipped run: 51 minutes on one core
    python -m tokenprune.scenes.training.train --out runs/scenes --minutes 20  # shorter, in the same proportions
    python -m tokenprune.scenes.training.train --out runs/scenes --export  # latest checkpoint to runs/scenes/embedded

A run can be stopped at any time; the same command resumes it from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from tokenprune.core.files import whole_file
from tokenprune.scenes.embedded import export
from tokenprune.scenes.training.log import Log
from tokenprune.scenes.training.phases import PHASES
from tokenprune.scenes.training.positions import POSITIONS
from tokenprune.scenes.training.texts import LAGS
from tokenprune.scenes.training.trainer import Plan, Trainer, make_plan

CHECKPOINT_SECONDS = 60.0


def seconds_per_step(seed: int, precision: str, device: torch.device) -> float:
    """Mean over the phases of the shipped run, measured on this machine with a few steps of each."""
    trial = Trainer(make_plan(seed, precision), device)
    total = 0.0
    for phase in PHASES:
        trial.train_step()
        start = time.perf_counter()
        for _ in range(8):
            trial.train_step()
        total += (time.perf_counter() - start) / 8 * phase.steps
        trial.next_phase()
    return total / sum(phase.steps for phase in PHASES)


def save(trainer: Trainer, path: Path, log: Log | None = None) -> None:
    """Write a checkpoint so that a run killed meanwhile keeps the previous one."""
    made = BytesIO()  # torch words a full disk as a fault of its own
    torch.save({**trainer.state_dict(), "log": None if log is None else log.state_dict()}, made)
    with whole_file(path) as file:
        file.write(made.getbuffer())


def run(trainer: Trainer, out: Path, logged: Mapping[str, Any] | None = None) -> None:
    """Train to the end of the plan, with a checkpoint every minute; `logged` is the log's state in the last one."""
    log, saved = Log(out / "training_log.jsonl", trainer, logged), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        while trainer.phase_number < len(PHASES):
            phase, total = trainer.phase, trainer.plan.steps[trainer.phase.name]
            bar = progress.add_task(phase.name, total=total, completed=trainer.step)
            while trainer.step < total:
                start = time.perf_counter()
                rate, parts, right = trainer.train_step()
                trainer.seconds += time.perf_counter() - start
                log.add(trainer, rate, parts, right)
                progress.advance(bar)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save(trainer, out / "checkpoint.pt", log)
                    saved = time.monotonic()
            trainer.next_phase()
            save(trainer, out / "checkpoint.pt", log)


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
    parser.add_argument("--text", choices=LAGS, default="recent", help="how far back the text phase repeats words")
    parser.add_argument("--positions", choices=POSITIONS, default="raster", help="position ids of vision tokens")
    parser.add_argument("--export", action="store_true", help="only write the weights of the latest checkpoint")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    try:
        _train(options, device)
    except OSError as error:
        sys.exit(f"error: cannot use {error.filename or options.out}: {error.strerror or error}")
    except SafetensorError as error:
        sys.exit(f"error: cannot write the weights to {options.out}: {error}")


def _train(options: argparse.Namespace, device: torch.device) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for left in options.out.glob(".tokenprune-*"):  # of a run that was killed while it wrote
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    plan_file, checkpoint = options.out / "training.json", options.out / "checkpoint.pt"
    if plan_file.exists():
        stored = json.loads(plan_file.read_text())
        plan = Plan(**{field.name: stored[field.name] for field in fields(Plan) if field.name in stored})
    else:
        steps = options.steps
        if options.minutes:
            steps = round(options.minutes * 60 / seconds_per_step(options.seed, options.precision, device))
        plan = make_plan(options.seed, options.precision, options.text, steps, options.positions)
        with whole_file(plan_file) as file:
            told = {**asdict(plan), "stages": [asdict(s) for s in PHASES]}
            file.write(f"{json.dumps(told, indent=1)}\n".encode())
    trainer, logged = Trainer(plan, device), None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trainer.load_state_dict(state)
        logged = state.get("log")  # none in checkpoints of version 0.1.0
    if not options.export:
        run(trainer, options.out, logged)
    export(trainer.model, options.out / "embedded")


if __name__ == "__main__":
    main()
