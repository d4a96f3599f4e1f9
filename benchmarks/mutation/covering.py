"""Which tests run which lines, and how long they take: a plugin for pytest, and what it has found."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest


class Recorder:
    """A pytest plugin that notes, of each test, the lines of the package that it runs and its seconds."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(data_file=None, source=["tokenprune"], config_file=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        self.coverage.start()
        try:
            return (yield)
        finally:
            self.coverage.stop()
            self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - start

    def _write(self) -> None:
        data = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for path in data.measured_files():
            lines[str(Path(path).relative_to(Path.cwd()))] = data.contexts_by_lineno(path)
        whole_file = self.file.with_suffix(".part")
        whole_file.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))
        whole_file.replace(self.file)


class Covering:
    """The tests that run a line, out of `among`, from the files that `Recorder` wrote."""

    def __init__(self, files: list[Path], among: set[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in files:
            found = json.loads(file.read_text())
            self.seconds |= {test: took for test, took in found["seconds"].items() if test in among}
            for path, lines in found["lines"].items():
                for line, tests in lines.items():
                    self.lines[path][int(line)].update(self.seconds.keys() & tests)

    def tests(self, path: str, line: int, seconds: float) -> list[str]:
        """Tests that run the line, the quick first, for about so many seconds; all where only imports run the file.

        Of each test function, and of each file, one case comes before all others have a second: many cases of one test
        notice the same mutants.
        """
        covering = self.lines[path].get(line) or {test for tests in self.lines[path].values() for test in tests}
        covering = covering or set(self.seconds)
        quick = sorted(covering, key=lambda test: self.seconds[test])
        seen: dict[str, int] = defaultdict(int)
        ranked = []
        for test in quick:
            function = test.partition("[")[0]
            seen[function] += 1
            ranked.append((seen[function], self.seconds[test], test))
        chosen, left = [], seconds
        for _, took, test in sorted(ranked):
            if took <= left or not chosen:
                chosen.append(test)
                left -= took
        return chosen
