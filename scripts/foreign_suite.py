"""Run transformers' own model tests with a recipe attached to every model that they build.

    python scripts/foreign_suite.py /path/to/transformers                       # recipe none
    python scripts/foreign_suite.py /path/to/transformers --recipes none uniform:1.0 --families llava qwen2_vl

The path is a source tree of transformers with its `tests/` (and `src/`, which the tests read), as near to the installed
version as can be had; nothing is fetched. The tests need `parameterized` and `httpx`. Each family's
`tests/models/FAMILY/test_modeling_FAMILY.py` runs untouched and with each recipe, in processes of their own. What
passes untouched and fails attached is printed with its message, and the exit code is then 1. Outcomes go to `--out`, as
JSON.

The second half of this file is a pytest plugin, which the runs load by name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial, wraps
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
Outcomes = dict[str, tuple[str, str]]
"""Name of a test to passed, failed or skipped, and the first line of its message."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="source tree of transformers")
    parser.add_argument(
        "--recipes", nargs="+", default=["none"], metavar="NAME[:KEEP]", help="recipes, each in a run of its own"
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--select", help="pytest's -k")
    parser.add_argument("--out", type=Path, help="write all outcomes here, as JSON")
    asked = parser.parse_args()
    missing = [f for f in asked.families if not (asked.tree / _tests(f)).is_file()]
    if missing:
        parser.error(f"{asked.tree} has no {_tests(missing[0])}; expected a source tree of transformers with its tests")
    print(f"transformers {importlib.metadata.version('transformers')}, tests of {asked.tree.name}")
    print(f"{'family':<12} {'pass untouched':>14} " + " ".join(f"{'fail ' + name:>20}" for name in asked.recipes))
    told: dict[str, dict[str, Outcomes]] = {}
    wrong: list[tuple[str, str, str, str]] = []
    for family in asked.families:
        told[family] = {"untouched": (untouched := _run(asked.tree, family, asked.select, None))}
        passes = [name for name, (outcome, _) in untouched.items() if outcome == "passed"]
        failing = []
        for recipe in asked.recipes:
            attached = told[family][recipe] = _run(asked.tree, family, asked.select, recipe)
            outcomes = [(name, *attached.get(name, ("missing", ""))) for name in passes]
            fails = [(family, recipe, name, message) for name, outcome, message in outcomes if outcome != "passed"]
            failing.append(len(fails))
            wrong += fails
        print(f"{family:<12} {len(passes):>14} " + " ".join(f"{count:>20}" for count in failing), flush=True)
        if asked.out is not None:
            asked.out.write_text(json.dumps(told, indent=1))
    for (family, recipe, message), count in Counter((f, r, message) for f, r, _, message in wrong).most_common():
        print(f"\n{family}, {recipe}: {count} x {message}")
        print("\n".join(f"    {name}" for f, r, name, said in wrong if (f, r, said) == (family, recipe, message)))
    return int(bool(wrong))


def _tests(family: str) -> str:
    return f"tests/models/{family}/test_modeling_{family}.py"


def _run(tree: Path, family: str, select: str | None, recipe: str | None) -> Outcomes:
    """Outcomes of the tests of one family. The plugin is found as this file's folder is on the path."""
    options = [] if recipe is None else [f"--attach={recipe}"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        launch = f"import sys, pytest; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.exit(pytest.main())"
        command = [sys.executable, "-c", launch, "-q", "-p", "no:cacheprovider", "-p", "foreign_suite", *options]
        command += [f"--junitxml={report}", _tests(family), *([] if select is None else ["-k", select])]
        ran = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if ran.returncode not in (0, 1) or not report.is_file():
            told = f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            sys.exit(f"{family}: pytest could not run the tests (exit code {ran.returncode}):\n{told}")
        if recipe is not None and not re.search(r"attached to [1-9]\d* models", ran.stdout):
            sys.exit(f"{family}: no model was attached to, so the run shows nothing:\n{ran.stdout[-2000:]}")
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
    parser.addoption("--attach", help="recipe for every model of a supported family, NAME or NAME:KEEP")


def pytest_configure(config: Any) -> None:
    if (recipe := config.getoption("--attach")) is not None:
        name, _, keep = recipe.partition(":")
        config.pluginmanager.register(Attaching(name, float(keep) if keep else None))


class Attaching:
    """Attaches a recipe to models of the supported families at the end of their construction: to the outermost."""

    def __init__(self, recipe: str, keep: float | None) -> None:
        import transformers as tf

        import tokenprune as tp
        from tokenprune.families.catalogue import adapters

        self.attach = partial(tp.attach, recipe=tp.load_recipe(recipe, keep=keep))
        self.building = self.models = 0
        for family in adapters():
            for mapping in (tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, tf.MODEL_MAPPING):
                model = mapping[tf.CONFIG_MAPPING[family]]
                model.__init__ = self._attaching(model.__init__)

    def _attaching(self, original: Any) -> Any:
        @wraps(original)
        def construct(model: Any, *args: Any, **kwargs: Any) -> None:
            self.building += 1
            try:
                original(model, *args, **kwargs)
            finally:
                self.building -= 1
            if not self.building:
                self.attach(model)
                self.models += 1

        return construct

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"attached to {self.models} models")


if __name__ == "__main__":
    sys.exit(main())
