"""What several processes and Ray cost on one machine: 150 questions by `tokenprune run --images`.

    python benchmarks/serving/workers.py [--rounds 1]

Needs the extra `ray`. The ways take turns. Writes workers.json beside this file: seconds by the clock of the whole
command, seconds of asking alone, and whether all files have the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
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


def asked(questions: Path, output: Path, way: list[str]) -> dict[str, Any]:
    """One run: seconds of the command, and what it says of itself."""
    command = [sys.executable, "-m", "tokenprune.cli", "run", "--images", str(questions), "--output", str(output)]
    command += ["--recipe", "uniform", "--keep", "36", "--batch-size", str(BATCH), "--measure", "0", "--json", *way]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    return {"command": time.perf_counter() - start, "asking": told["seconds"], "answers": told["answered_now"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with TemporaryDirectory() as made:
        folder = Path(made)
        questions, files = album(folder), set[bytes]()
        for number in range(rounds):
            for way, options in WAYS.items():
                output = folder / f"{number}-{len(options)}.jsonl"
                runs[way].append(asked(questions, output, options))
                files.add(output.read_bytes())
                print(f"{way}: {runs[way][-1]}", flush=True)
    told = {"machine": {"device": platform.machine(), "cores": os.cpu_count()}, "same_bytes": len(files) == 1}
    OUT.write_text(json.dumps({**told, "runs": runs}, indent=1) + "\n")
    print(f"same bytes: {len(files) == 1}")


if __name__ == "__main__":
    main()
