"""Writes what each family can do to tests/support.json and docs/models.md: python scripts/support.py [--page | --check]

Every check of tests/abilities.py runs for every tiny model of tests/family_models, about a minute in all. A family that
is wrong without saying so ends the script: then there is no table. `--page` runs nothing, and writes the page from the
file; `--check` compares the two, and tests/engine/test_matrix.py compares the file with what the families do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from abilities import CHECKS, FOUND, refusal  # noqa: E402
from family_models import MODELS  # noqa: E402

from tokenprune.families.catalogue import REFUSED, adapters  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- generated: support -->\n", "<!-- end of support -->"
HEADS = {"ragged": "batch", "static": "static cache", "none": "no cache", "keep 1.0": "`keep: 1.0`"}
"""Columns that are called otherwise than in the tests."""

Found = dict[str, dict[str, str]]


def find() -> Found:
    """For each family the abilities that it refuses, and with which words."""
    found: Found = {}
    for family in MODELS:
        told = {ability: refusal(family, ability) for ability in CHECKS}
        found[family] = {ability: words for ability, words in told.items() if words is not None}
        print(f"{family}: {len(CHECKS) - len(found[family])} of {len(CHECKS)}")
    return found


def plainly(words: str, name: str) -> str:
    """A refusal without the family's names, so that families which refuse alike share a line."""
    adapter = adapters()[MODELS[name].config()[1].model_type]
    for own in (f"{adapter.family} ({adapter.title})", adapter.title):
        words = words.replace(own, "this family")
    return words.removesuffix(f", {type(adapter).__name__}")


def table(found: Found) -> str:
    """One row a family, one column an ability, and the reasons below."""
    found = {name: {ability: plainly(words, name) for ability, words in told.items()} for name, told in found.items()}
    reasons = list(dict.fromkeys(words for told in found.values() for words in told.values()))
    heads = ["family", "`model_type`", "vision tokens", *(HEADS.get(name, name) for name in CHECKS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, tiny in MODELS.items():
        adapter = adapters()[tiny.config()[1].model_type]
        title = f"{adapter.title}, {tiny.variant}" if tiny.variant else adapter.title
        told = found[name]
        marks = [f"– ({reasons.index(told[ability]) + 1})" if ability in told else "✓" for ability in CHECKS]
        lines.append("| " + " | ".join([title, f"`{adapter.family}`", adapter.pictures, *marks]) + " |")
    if reasons:
        lines += ["", "What is refused, and with which words:", ""]
        lines += [f"{number}. {words}" for number, words in enumerate(reasons, start=1)]
    lines += ["", "Families that are refused altogether:", ""]
    lines += [f"- `{family}`: {reason}" for family, reason in REFUSED.items()]
    return "\n".join(lines) + "\n"


def written(found: Found) -> str:
    """The page with the table in its place."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    return before + START + table(found) + END + rest.partition(END)[2]


def main(arguments: list[str]) -> None:
    """Write file and page, or the page alone, or print what is out of date."""
    if "--page" in arguments:
        PAGE.write_text(written(json.loads(FOUND.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if "--check" in arguments:
        found = json.loads(FOUND.read_text(encoding="utf-8"))
        if set(found) != set(MODELS) or written(found) != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE.relative_to(ROOT)} is out of date: run python scripts/support.py")
        return
    found = find()
    FOUND.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(written(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
