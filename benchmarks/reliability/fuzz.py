"""Long fuzzing: random recipes, prompts, question files and pictures, each held to what docs/reliability.md promises.

    python benchmarks/reliability/fuzz.py --recipes 100000 --prompts 2000 --files 20000 --pictures 20000

Every case is named by its number, which seeds it; the same number makes the same case. What was counted is written to
fuzz.json beside this file, and the same command goes on where it stopped. Cases that broke a promise are listed there
with number and error, are tried again by the next call, and can be looked at one by one:

    python benchmarks/reliability/fuzz.py --prompts 1 --first 1234    # raises what was wrong, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
CASES = {
    "recipes": "fuzzing.recipes:one_recipe",
    "prompts": "fuzzing.prompts:one_prompt",
    "files": "fuzzing.files:one_file",
    "pictures": "fuzzing.files:one_picture",
}
EVERY = 20.0
"""Seconds between two times that results are written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in CASES:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"so many random {kind}")
    parser.add_argument("--first", type=int, metavar="CASE", help="only look at the cases from this number on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fuzz.json"))
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for kind in CASES:
        wanted = getattr(options, kind)
        if wanted and options.first is not None:
            for case in range(options.first, options.first + wanted):
                print(kind, case, _cases(kind)(Random(case)))
        elif wanted:
            _run(kind, wanted, options.out)


def _cases(kind: str) -> Callable[[Random], list[str]]:
    module, _, name = CASES[kind].partition(":")
    found: Callable[[Random], list[str]] = getattr(import_module(module), name)
    return found


def _run(kind: str, wanted: int, out: Path) -> None:
    """The cases of one kind that are not done yet."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    known = _read(out).get(kind, {})
    outcomes: Counter[str] = Counter(known.get("outcomes", {}))
    wrong: list[dict[str, Any]] = []
    done, seconds, written = known.get("cases", 0), known.get("seconds", 0.0), time.perf_counter()
    again = [entry["case"] for entry in known.get("wrong", [])]  # what was wrong may be mended
    one = _cases(kind)

    def write() -> None:
        counted = {"cases": done, "seconds": round(seconds, 1), "outcomes": dict(sorted(outcomes.items()))}
        _write(out, {**_read(out), kind: {**counted, "wrong": wrong}})

    columns = TextColumn(f"{kind:9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[wrong]} wrong")) as progress:
        bar = progress.add_task(kind, total=max(wanted, done), completed=done - len(again), wrong=0)
        for case in [*again, *range(done, wanted)]:
            begin = time.perf_counter()
            try:
                outcomes.update(one(Random(case)))
            except Exception as error:
                told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                wrong.append({"case": case, "error": told[:300]})
            now = time.perf_counter()
            seconds, done = seconds + now - begin, max(done, case + 1)
            progress.update(bar, advance=1, wrong=len(wrong))
            if case not in again and now - written > EVERY:
                write()
                written = now
        write()


def _read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found


def _write(out: Path, results: dict[str, Any]) -> None:
    part = out.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(out)


if __name__ == "__main__":
    main()
