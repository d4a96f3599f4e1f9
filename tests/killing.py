"""SIGKILL at random moments: what a run that is resumed gives must be what an uninterrupted one gives.

    python tests/killing.py eval 20        # so many kills; also: tune, bench, many, training

One process imports everything once; each try is a fork of it, so that a try takes seconds.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

KINDS = ("eval", "tune", "bench", "many", "training")


def forked(work: Callable[[], int], out: Path, after: float | None) -> int | None:
    """Exit status of `work` in a process of its own, stdout in `out`; None where it was killed `after` seconds."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            where = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = work()
            sys.stdout.flush()
        finally:
            os._exit(code)
    end = None if after is None else time.monotonic() + after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def without_times(told: Any) -> Any:
    """Results without what no two runs share: seconds, and the file names that were asked for."""
    if isinstance(told, dict):
        return {k: without_times(v) for k, v in told.items() if "seconds" not in k and k not in ("plot", "winner_file")}
    return [without_times(each) for each in told] if isinstance(told, list) else told


def command(*arguments: object) -> Callable[[], int]:
    from tokenprune.cli.main import call

    return lambda: call([str(each) for each in arguments])


def work_of(kind: str, folder: Path) -> Callable[[], int]:
    """What is run in `folder`."""
    folder.mkdir(exist_ok=True)
    if kind == "eval":
        files = ("--output", folder / "o", "--csv", folder / "e.csv", "--save-plot", folder / "e.png")
        return command("eval", "fastv", "--keep", 0.5, "--scenes", 2, "--seeds", 1, "--batch-size", 4, *files, "--json")
    if kind == "tune":
        size = ("--scenes", 2, "--seeds", 1, "--trials", 3, "--average", 0.4, "--task", "colour", "--batch-size", 4)
        choices = ("--choose", "stages.0.scorer=norm,attention", "--choose", "stages.0.sampler=top_k,max_min")
        return command("tune", "fastv", *size, *choices, "--output", folder / "o", "--json")
    if kind == "bench":
        size = ("--batch", 1, "--rounds", 3, "--new-tokens", 2, "--no-baselines")
        return command("bench", "fastv", "--keep", 0.5, *size, "--save-plot", folder / "b.png", "--json")
    if kind == "many":
        from tokenprune.scenes import samples

        files = ("--images", samples()[0].path.parent, "--output", folder / "a.jsonl", "--batch-size", 1)
        return command("run", *files, "--question", "is there a red ring ?", "--recipe", "fastv", "--json")
    return lambda: train(folder)


def train(folder: Path) -> int:
    """The real training, two scenes a step and two decoder layers, with a checkpoint after every second step or so."""
    import torch

    from tokenprune.scenes.training import log, trainer
    from tokenprune.scenes.training import train as training
    from tokenprune.scenes.training.model import build_config, build_model
    from tokenprune.scenes.training.phases import PHASES

    small = tuple(replace(phase, batch=min(phase.batch, 2), texts=min(phase.texts, 2)) for phase in PHASES)
    for module in (log, training, trainer):
        module.PHASES = small  # type: ignore[attr-defined]
    trainer.build_model = lambda seed: build_model(build_config(layers=2), seed=seed)
    training.CHECKPOINT_SECONDS, log.LOG_EVERY = 0.05, 3
    torch.set_num_threads(1)
    training.main(["--out", str(folder), "--steps", "24"])
    return 0


def outcome(kind: str, folder: Path, out: Path) -> Any:
    """All that a run leaves behind, without times."""
    if kind == "training":
        lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        weights = {file.name: file.read_bytes() for file in (folder / "embedded").iterdir()}
        return without_times(lines), weights, sorted(path.name for path in folder.iterdir())
    if kind == "many":
        return (folder / "a.jsonl").read_bytes(), [path.name for path in folder.glob("[!.]*")]
    told = without_times(json.loads(out.read_text()))
    if kind == "bench":
        exact = (str, int)  # times and what is worked out from them are real numbers
        return [{k: v for k, v in row.items() if isinstance(v, exact)} for row in told["rows"]]
    if kind == "tune":
        return told, (folder / "o/winner.yaml").read_text()
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader((folder / "e.csv").open())]
    keys = sorted(json.loads(line)["key"] for line in (folder / "o/results.jsonl").read_text().splitlines())
    return told, rows, keys


def check_whole(folder: Path) -> None:
    """Nothing under its final name is half-written."""
    from PIL import Image

    for picture in (*folder.glob("[!.]*.png"), *folder.glob("o/[!.]*.png")):
        Image.open(picture).load()
    for winner in folder.glob("o/winner.yaml"):
        from tokenprune.recipe import load_recipe

        load_recipe(winner)
    for table in folder.glob("[!.]*.csv"):
        assert table.read_text().endswith("\n")
    if (folder / "checkpoint.pt").exists():
        import torch

        torch.load(folder / "checkpoint.pt", weights_only=True)
    if (folder / "training.json").exists():
        json.loads((folder / "training.json").read_text())


def survive(kind: str, kills: int, seed: int = 0) -> str:
    """Kill `kind` so often, let it end, and compare; in words, what was seen.

    Raises:
        AssertionError: something was lost or half-written.
    """
    import matplotlib.figure  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import tokenprune.scenes.training.train
    import tokenprune.study.evaluate  # noqa: F401

    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        start = time.monotonic()
        assert forked(work_of(kind, root / "whole"), root / "whole.out", None) == 0
        long = time.monotonic() - start
        wanted = outcome(kind, root / "whole", root / "whole.out")
        done = rounds = 0
        while done < kills:
            folder, rounds, status = root / f"cut{rounds}", rounds + 1, None
            while status is None:
                after = chance.uniform(0.0, long) if done < kills else None
                status = forked(work_of(kind, folder), root / "cut.out", after)
                done += status is None
                check_whole(folder)
            assert status == 0, status
            assert outcome(kind, folder, root / "cut.out") == wanted
    return f"{kind}: {done} kills in {rounds} runs of {long:.1f} s; nothing lost"


if __name__ == "__main__":
    print(survive(sys.argv[1], int(sys.argv[2])))
