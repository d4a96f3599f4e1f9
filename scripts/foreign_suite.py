"""Run transformers' own model tests with a recipe attached to every model that they build.

    python scripts/foreign_suite.py /path/to/transformers                       # recipe none
    python scripts/foreign_suite.py /path/to/transformers --recipe uniform --keep 1.0 --families llava qwen2_vl

The path is a source tree of transformers with its `tests/` (and `src/`, which the tests read), as near to the installed
version as can be had; nothing is fetched. The tests need `parameterized` and `httpx`. Each family's
`tests/models/FAMILY/test_modeling_FAMILY.py` runs twice, untouched and attached, in processes of their own. What passes
untouched and fails attached is printed with its message, and the exit code is then 1. Outcomes go to `--out`, as JSON.

The second half of this file is a pytest plugin, which the runs load by name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
Outcomes = dict[str, tuple[str, str]]
"""Name of a test to passed, failed or skipped, and the first line of its message."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="source tree of transformers")
    parser.add_argument("--recipe", default="none", help="name or path of a recipe; none when left out")
    parser.add_argument("--keep", type=float, help="budget of the recipe, such as 1.0")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--select", help="pytest's -k")
    parser.add_argument("--out", type=Path, help="write all outcomes here, as JSON")
    asked = parser.parse_args()
    missing = [f for f in asked.families if not (asked.tree / _tests(f)).is_file()]
    if missing:
        parser.error(f"{asked.tree} has no {_tests(missing[0])}; expected a source tree of transformers with its tests")
    print(f"transformers {importlib.metadata.version('transformers')}, tests of {asked.tree.name}")
    print(f"{'family':<12} {'pass untouched':>14} {'pass attached':>14} {'fail attached':>14} {'seconds':>8}")
    told, wrong = {}, {}
    for family in asked.families:
        start = time.monotonic()
        attach = [f"--attach={asked.recipe}", *([] if asked.keep is None else [f"--attach-keep={asked.keep}"])]
        untouched = _run(asked.tree, family, asked.select, [])
        attached = _run(asked.tree, family, asked.select, attach)
        passes = [name for name, (outcome, _) in untouched.items() if outcome == "passed"]
        fails = {name: attached.get(name, ("missing", "")) for name in passes}
        fails = {name: told for name, told in fails.items() if told[0] != "passed"}
        seconds = time.monotonic() - start
        print(
            f"{family:<12} {len(passes):>14} {len(passes) - len(fails):>14} {len(fails):>14} {seconds:>8.0f}",
            flush=True,
        )
        told[family] = {"untouched": untouched, "attached": attached}
        wrong[family] = fails
    for family, fails in wrong.items():
        for reason, count in Counter(message for _, message in fails.values()).most_common():
            print(f"\n{family}: {count} x {reason}")
            print("\n".join(f"    {name}" for name, (_, message) in fails.items() if message == reason))
    if asked.out is not None:
        asked.out.write_text(json.dumps(told, indent=1))
    return int(any(wrong.values()))


def _tests(family: str) -> str:
    return f"tests/models/{family}/test_modeling_{family}.py"


def _run(tree: Path, family: str, select: str | None, options: list[str]) -> Outcomes:
    """Outcomes of the tests of one family. The plugin is found as this file's folder is on the path."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        launch = f"import sys, pytest; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.exit(pytest.main())"
        command = [sys.executable, "-c", launch, "-q", "-p", "no:cacheprovider", "-p", "foreign_suite", *options]
        command += [f"--junitxml={report}", _tests(family), *([] if select is None else ["-k", select])]
        ran = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if ran.returncode not in (0, 1) or not report.is_file():
            told = f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            sys.exit(f"{family}: pytest could not run the tests (exit code {ran.returncode}):\n{told}")
        return _outcomes(ElementTree.parse(report).getroot())


def _outcomes(root: ElementTree.Element) -> Outcomes:
    found: Outcomes = {}
    for case in root.iter("testcase"):
        told = [(child.tag, child.get("message", "")) for child in case if child.tag in ("failure", "error", "skipped")]
        outcome, message = told[0] if told else ("passed", "")
        first = next(iter(message.splitlines()), "")
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = (outcome, first)
    if not found:
        sys.exit("no test was collected")
    return found


# ------------------------------------------------------------------------------------------ the plugin of the runs


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--attach", help="recipe for every model of a supported family")
    parser.addoption("--attach-keep", type=float)


def pytest_configure(config: Any) -> None:
    if (recipe := config.getoption("--attach")) is not None:
        _attach_to_all(recipe, config.getoption("--attach-keep"))


def _attach_to_all(recipe: str, keep: float | None) -> None:
    """Models of the supported families attach the recipe at the end of their construction: the outermost one does."""
    import transformers as tf

    import tokenprune as tp
    from tokenprune.families.catalogue import adapters

    loaded = tp.load_recipe(recipe, keep=keep)
    building = 0

    def attaching(original: Any) -> Any:
        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal building
            building += 1
            try:
                original(self, *args, **kwargs)
            finally:
                building -= 1
            if not building:
                tp.attach(self, loaded)

        return construct

    for family in adapters():
        for mapping in (tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, tf.MODEL_MAPPING):
            one = mapping[tf.CONFIG_MAPPING[family]]
            one.__init__ = attaching(one.__init__)


if __name__ == "__main__":
    sys.exit(main())
