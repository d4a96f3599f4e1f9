"""Pages that repeat what the code says: each must still say the same."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tokenprune.errors import RecipeError
from tokenprune.families.adapter import ADAPTERS
from tokenprune.recipe import list_recipes, load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes_page() -> ModuleType:
    return script("recipes_page")


def test_recipes_page_is_up_to_date(recipes_page: ModuleType) -> None:
    assert recipes_page.written() == page("recipes.md"), "run: python scripts/recipes_page.py"


def test_performance_page_is_up_to_date() -> None:
    assert script("performance_page").written() == page("performance.md"), "run: python scripts/performance_page.py"


def test_every_recipe_has_a_row_and_a_section() -> None:
    text = page("recipes.md")
    for name in list_recipes():
        assert f"[`{name}`" in text and f"\n### {name}\n" in text, name
        assert all(f"`{variant}`" in text for variant in load_recipe(name).variants), name


def test_every_family_has_a_row() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `([a-z0-9_]+)` \|", page("models.md"), flags=re.MULTILINE)
    assert rows[1:] == [(adapter.title, adapter.family) for adapter in ADAPTERS]


def test_errors_look_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", page("write-a-recipe.md"), flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(blocks[0], encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("bad.yaml")
    shown = blocks[1].rpartition("\n5 problems in 1 of 1 file\n")[0]
    assert str(caught.value).strip() == shown


def test_every_default_part_is_named_in_the_table_of_keys() -> None:
    from tokenprune.registry import ROLES, parts

    text = page("write-a-recipe.md")
    for role in ROLES:
        (row,) = re.findall(rf"^\| `{role}` \|.*$", text, flags=re.MULTILINE)
        own = [name for name, part in parts(role).items() if part.__module__.startswith("tokenprune.")]
        assert all(f"`{name}`" in row for name in own), role


def test_pictures_exist() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{path.name}: {target}"
