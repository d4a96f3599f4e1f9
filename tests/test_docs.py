"""Pages that repeat what the code says: each must still say the same."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokenprune.errors import RecipeError
from tokenprune.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))  # for its neighbours, as when it is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def test_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of recipes and parts; run python scripts/tables.py after a change."""
    script("tables").main(["--check"])
    assert not capsys.readouterr().out


def test_performance_page_is_up_to_date() -> None:
    assert script("performance_page").written() == page("performance.md"), "run: python scripts/performance_page.py"


def test_the_table_of_families_is_what_their_tests_found(capsys: pytest.CaptureFixture[str]) -> None:
    script("support").main(["--check"])
    assert not capsys.readouterr().out


def test_errors_look_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", page("write-a-recipe.md"), flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(blocks[0], encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("bad.yaml")
    shown = blocks[1].rpartition("\n5 problems in 1 of 1 file\n")[0]
    assert str(caught.value).strip() == shown


def test_pictures_exist() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{path.name}: {target}"
