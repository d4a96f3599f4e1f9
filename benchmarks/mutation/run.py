"""A mutation run: how many small changes to the code some test notices.

    python benchmarks/mutation/run.py map       # once: which tests run which lines; takes longer than the tests
    python benchmarks/mutation/run.py test --count 100 --seed 1  # after changes, what changed is run anew
    python benchmarks/mutation/run.py report    # table, survivors; writes results.json

Needs the extra `mutation`. The tests that run the changed line are run in a fork of a process that has imported the
libraries already, with the changed file in place of the real one: nothing on disk changes. Interrupted runs go on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import transformers  # noqa: F401  imported before the forks
from covering import Covering, Recorder
from mutants import GROUPS, UNCHANGED, Mutant, sample
from rich.console import Console
from rich.progress import track

from tokenprune.study.statistics import wilson

WORK = Path(".mutation")
"""Maps and outcomes of this checkout; what is committed is results.json."""
OUTCOMES = WORK / "outcomes.jsonl"
RESULTS = Path(__file__).with_name("results.json")
REASONS = Path(__file__).with_name("survivors.json")
"""Why a survivor may survive: key of a mutant to a reason."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    mapping = commands.add_parser("map", help="run the tests once and note which lines each runs")
    mapping.epilog = "Further arguments are passed on to pytest, such as tests/parts or --ignore tests/cli."
    mapping.add_argument("--name", default="all", help="file of the map, so that parts can be made anew")
    testing = commands.add_parser("test", help="run a sample of mutants")
    testing.add_argument("--count", type=int, default=100, help="mutants of each group (default 100)")
    testing.add_argument("--seed", type=int, default=0)
    testing.add_argument("--groups", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    testing.add_argument("--seconds", type=float, default=60.0, help="of tests for one mutant (default 60)")
    testing.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th from the I-th"
    )
    commands.add_parser("report", help="table and survivors")
    options, more = parser.parse_known_args()
    if more and options.command != "map":
        parser.error(f"unknown: {' '.join(more)}")
    WORK.mkdir(exist_ok=True)
    if options.command == "map":
        recorder = Recorder(WORK / f"map-{options.name}.json")
        sys.exit(pytest.main(["-p", "no:cacheprovider", *more], plugins=[recorder]))
    if options.command == "test":
        _test(options)
    _report()


def _test(options: argparse.Namespace) -> None:
    covering = Covering(sorted(WORK.glob("map-*.json")), _collected())
    known = _outcomes()
    torch.set_num_threads(1)
    chosen = [mutant for group in options.groups for mutant in sample(group, options.count, options.seed)]
    first, step = options.part
    controlled: set[str] = set()
    for mutant in track(chosen[first::step], "mutants", console=Console(stderr=True)):
        before = known.get(mutant.key)
        if before and (before["outcome"].startswith("killed") or before["seconds"] >= options.seconds):
            continue
        tests = covering.tests(mutant.path, mutant.line, options.seconds)
        if mutant.path not in controlled:
            # The unchanged file first: tests that fail here would call every mutant noticed.
            if _run(replace(mutant, operator=UNCHANGED), tests, limit=8 * options.seconds + 120) != "survived":
                sys.exit(f"{mutant.path}: its tests fail without any change; make the map anew, or mend them first")
            controlled.add(mutant.path)
        start = time.perf_counter()
        outcome = _run(mutant, tests, limit=4 * options.seconds + 60)
        entry = {"key": mutant.key, "path": mutant.path, "line": mutant.line, "operator": mutant.operator}
        entry |= {"outcome": outcome, "tests": len(tests), "seconds": options.seconds, "shown": mutant.shown()}
        entry["took"] = round(time.perf_counter() - start, 1)
        with OUTCOMES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _collected() -> set[str]:
    """Tests that run where nothing is said of markers, without the blocks of pages, which build on each other; asked in
    a process of its own, so that this one imports no test."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line for line in told.splitlines() if line.startswith("tests/") and "::" in line}


def _run(mutant: Mutant, tests: list[str], *, limit: float) -> str:
    """``killed``, ``killed by time`` or ``survived``."""
    child = os.fork()
    if child == 0:
        os.setpgrp()  # so that processes of tests end with it
        try:
            _become(mutant)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                status = pytest.main(["-x", "-p", "no:cacheprovider", *tests])
        except BaseException:
            status = 1
        os._exit(int(status))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _kill(child)
            return _OUTCOMES.get(os.waitstatus_to_exitcode(status), "killed")
        time.sleep(0.02)
    _kill(child)
    os.waitpid(child, 0)
    return "killed by time"


_OUTCOMES = {0: "survived", 3: "broken run", 4: "broken run", 5: "broken run"}
"""By pytest's exit status: 1 and 2 are failures of tests and of imports; whatever else ends a process is one, too."""


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module of the package from the changed text."""

    def __init__(self, name: str, path: str, code: str) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        package = self.path.endswith("__init__.py")
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=[str(Path(self.path).parent)] if package else None
        )

    def get_filename(self, name: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.code.encode()


def _become(mutant: Mutant) -> None:
    """Make this process one that runs the mutant."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tokenprune"]:
        del sys.modules[name]
    name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    sys.meta_path.insert(0, _Changed(name, str(Path(mutant.path).resolve()), mutant.code))


def _outcomes() -> dict[str, dict[str, object]]:
    if not OUTCOMES.exists():
        return {}
    entries = map(json.loads, OUTCOMES.read_text(encoding="utf-8").splitlines())
    return {entry["key"]: entry for entry in entries}


def _report() -> None:
    """The outcomes of mutants that the code of today still has."""
    reasons = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    outcomes = _outcomes()
    groups, survivors = {}, []
    for group in GROUPS:
        entries = [outcomes[mutant.key] for mutant in sample(group, None, 0) if mutant.key in outcomes]
        entries = [entry for entry in entries if entry["outcome"] != "broken run"]
        killed = sum(str(entry["outcome"]).startswith("killed") for entry in entries)
        excused = [entry for entry in entries if entry["key"] in reasons]
        if not entries:
            continue
        low, high = wilson(killed, len(entries))
        files: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for entry in entries:
            files[str(entry["path"])][0] += str(entry["outcome"]).startswith("killed")
            files[str(entry["path"])][1] += 1
        groups[group] = {
            "mutants": len(entries), "killed": killed, "share": killed / len(entries), "low": low, "high": high,
            "with a reason": len(excused), "files": files,
        }  # fmt: skip
        survivors += [entry | {"reason": reasons.get(entry["key"])} for entry in entries
                      if not str(entry["outcome"]).startswith("killed")]  # fmt: skip
        print(f"{group}: {killed} of {len(entries)} noticed, {killed / len(entries):.1%} ({low:.1%} … {high:.1%})")
    for entry in survivors:
        print(f"\n{entry['path']}:{entry['line']} {entry['key']} {entry['operator']}: {entry['outcome']} "
              f"{entry['tests']} tests\n{entry['shown']}\n  {entry['reason'] or '(no reason given)'}")  # fmt: skip
    RESULTS.write_text(json.dumps({"groups": groups, "survivors": survivors}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
