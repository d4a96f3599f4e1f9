"""What several processes and Ray cost on one machine: `run --images`, `eval` and `tune` in one process and in two.

    python benchmarks/serving/workers.py [--rounds 1] [--commands run eval tune longer] [--ways "one process" ...]

Needs the extra `ray`. The ways take turns. Writes workers.json beside this file, which keeps commands and ways that are
not asked for: seconds by the clock of each whole command, and whether all ways gave the same result: for `run` the
bytes of its file, for the others all that they print but times and names of files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenprune as tp

OUT = Path(__file__).with_name("workers.json")
WAYS = {
    "one process": [],
    "two processes": ["--workers", "2"],
    "Ray, two workers": ["--ray", "local", "--workers", "2"],
}
QUESTIONS, SCENES, BATCH = 150, 16, 16
BATCHES = ["--batch-size", str(BATCH), "--json"]


def album(folder: Path) -> Path:
    """Questions about scenes, as a list for --images."""
    lines, names = [], dict[str, str]()
    for case in tp.scene_cases(SCENES)[:QUESTIONS]:
        if case.picture_id not in names:
            names[case.picture_id] = f"{len(names)}.png"
            case.picture().save(folder / names[case.picture_id])
        lines.append(json.dumps({"image": names[case.picture_id], "question": case.question}) + "\n")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(dict.fromkeys(lines)))
    return questions


def run(folder: Path, output: Path) -> list[str]:
    """150 questions about 16 pictures."""
    files = ["--images", str(folder / "questions.jsonl"), "--output", f"{output}.jsonl"]
    return ["run", *files, "--recipe", "uniform", "--keep", "36", "--measure", "0", *BATCHES]


def evaluated(folder: Path, output: Path) -> list[str]:
    """16 scenes under seven conditions; in `run`'s prompts, so that the work is that of a model without packing."""
    return ["eval", "fastv", "--keep", "36", "--scenes", str(SCENES), "--seeds", "1", "--no-packed", *BATCHES]


def tuned(folder: Path, output: Path) -> list[str]:
    """Eight recipes on 8 scenes, the report on 8 others."""
    choices = ["--choose", "stages.0.scorer=norm,attention", "--choose", "stages.0.sampler=top_k,max_min,uniform"]
    size = ["--average", "0.4", "--scenes", str(SCENES), "--seeds", "1", "--no-packed"]
    return ["tune", "fastv", *choices, *size, "--output", str(output), *BATCHES]


def longer(folder: Path, output: Path) -> list[str]:
    """The same on 100 scenes, for what is left of the price of loading."""
    command = evaluated(folder, output)
    command[command.index("--scenes") + 1] = "100"
    return command


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "run": run,
    "eval": evaluated,
    "tune": tuned,
    "longer": longer,
}


def asked(command: list[str], output: Path) -> tuple[dict[str, Any], Any]:
    """Seconds of the command, and what it made, without times."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tokenprune.cli", *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    if command[0] == "run":
        return {"command": seconds, "asking": told["seconds"]}, Path(f"{output}.jsonl").read_text()
    return {"command": seconds}, without_times(told)


def without_times(told: Any) -> Any:
    """Results without what no two runs share."""
    if isinstance(told, dict):
        return {k: without_times(v) for k, v in told.items() if "seconds" not in k and k not in ("plot", "winner_file")}
    return [without_times(each) for each in told] if isinstance(told, list) else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    told: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    told["machine"] = {"device": platform.machine(), "cores": os.cpu_count()}
    for name in given.commands:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
        results = []
        with TemporaryDirectory() as made:
            album(Path(made))
            for number in range(given.rounds):
                for way in given.ways:
                    output = Path(made) / f"{number} {way}"
                    command = [*COMMANDS[name](Path(made), output), *WAYS[way]]
                    seconds, result = asked(command, output)
                    runs[way].append(seconds)
                    results.append(result)
                    print(f"{name}, {way}: {seconds}", flush=True)
        same = all(result == results[0] for result in results)
        print(f"{name}: same result {same}")
        told.setdefault("commands", {})[name] = {"same": same, "runs": runs}
        OUT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
