"""Promises of the project itself: what is installed, what an import costs, what the README says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tokenprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str) -> str:
    return run(sys.executable, "-c", code)


# ---------------------------------------------------------------------------------------------------- what is installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    (path,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_all_recipes(wheel: set[str]) -> None:
    assert RECIPES
    assert {f"tokenprune/recipes/{path.relative_to(ROOT / 'recipes')}" for path in RECIPES} <= wheel


def test_wheel_holds_every_file_of_the_package(wheel: set[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= wheel
    assert {"tokenprune/py.typed", "tokenprune/scenes/assets/embedded/model.safetensors"} <= wheel
    assert any(name.startswith("tokenprune/scenes/assets/samples/") and name.endswith(".png") for name in wheel)


def test_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {
        "tokenprune",
        f"tokenprune_vlm-{version('tokenprune-vlm')}.dist-info",
    }


def test_one_version_everywhere() -> None:
    import tokenprune

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tokenprune.__version__ == version("tokenprune-vlm") == declared
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_dependency_and_no_cuda() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), "an exact version, without a local build tag"
        name, number = line.split("==")
        pinned[_normal(name)] = number
    assert pinned["torch"] == "2.13.0"
    assert not [name for name in pinned if name.startswith(("nvidia", "triton", "cuda"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    assert {_normal(re.split(r"[\[<>=~! ]", each)[0]) for each in wanted} - {"tokenprune-vlm"} <= set(pinned)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ------------------------------------------------------------------------------------------------- what an import costs

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked by a test")
sys.meta_path.insert(0, Block())
"""


def test_parts_and_recipes_work_without_transformers() -> None:
    code = BLOCK.format(blocked={"transformers", "matplotlib", "typer"}) + (
        "import torch, tokenprune as tp\n"
        "studies = {'audit', 'bench', 'evaluate', 'make_conditions', 'plot_kept', 'scene_cases'}\n"
        "studies |= {'fit', 'make_space', 'tune'}\n"
        "engine = {'attach', 'Attached', 'attach_vision', 'AttachedVision', 'encode', 'Encoded'}\n"
        "for name in {*tp.__all__} - studies - engine: getattr(tp, name)\n"
        "pipeline = tp.build(tp.load_recipe('uniform', keep=16))\n"
        "tokens = tp.Tokens.from_hidden(torch.randn(2, 64, 8), text=torch.randn(2, 5, 8))\n"
        "reduced = pipeline['after_vision'](tokens)\n"
        "assert reduced.sizes == (16, 16), reduced.sizes\n"
    )
    python(code)


def test_import_is_light() -> None:
    heavy = python("import sys, tokenprune; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert not {"transformers", "matplotlib", "typer", "rich"} & set(heavy)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from tokenprune.cli.main import main\n"
        "sys.argv = ['tokenprune', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert "run" in python(code)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_declared_dependencies_are_imported() -> None:
    names = {"pyyaml": "yaml", "pillow": "PIL", "docstring-parser": "docstring_parser"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    known = {names.get(name, name) for name in (re.split(r"[<>=]", each)[0] for each in declared)}
    allowed = known | set(sys.stdlib_module_names) | {"tokenprune"}
    allowed |= {"pydantic_core", "tokenizers"}  # which pydantic and transformers themselves require
    allowed |= {"fvcore", "optuna", "av", "ray"}  # of extras, imported where they are asked for
    for path in MODULES:
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path
    used = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert known <= used, "a dependency that nothing imports"


def test_package_reads_no_environment_and_names_no_host() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"os\.environ|getenv|environb", text), path
        assert set(re.findall(r"https?://([^/\s\"'`]+)", text)) <= {"arxiv.org", "json-schema.org"}, path


# ---------------------------------------------------------------------------------------------- what the documents say


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if block.startswith("python3 -m venv")]


def test_commands_of_the_readme_are_short_lines_of_one_command_each() -> None:
    for command in commands():
        lines = command.splitlines()
        assert all(len(line) <= 76 for line in lines)
        assert all(line.endswith(" &&") for line in lines[:-1])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    _, test = commands()
    assert f"\n{test}" in (ROOT / ".ci" / "run").read_text()


def test_main_command_of_the_readme_is_one_of_the_command_line() -> None:
    """Without a picture it asks about a shipped one: tests/cli/test_run.py."""
    main, _ = commands()
    assert main.splitlines()[-1] == ".venv/bin/tokenprune run --save-plot kept.png"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_blocks_are_of_a_kind_that_is_tested(page: Path) -> None:
    """Sybil runs blocks whose info string is just ``python`` or ``yaml``; anything more would be skipped in silence."""
    kinds = re.findall(r"^ *(?:```|~~~)(\S[^\n`]*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(kinds) <= {"python", "yaml", "bash", "pycon", "text", "json"}


def test_no_page_names_a_machine_or_a_package_index() -> None:
    # The README's first command draws a picture there.
    files = [path for path in ROOT.glob("*.*") if path.is_file() and path.suffix != ".png"]
    for path in [*PAGES, *files, ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|work|opt|Users)/|index-url|find-links|pypi\.|download\.pytorch", text), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Every number links to the script that made it."""
    named = re.findall(r"\b(?:benchmarks|scripts|tests)/[\w/-]+\.(?:py|md|json)\b", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
