"""Which file a name or a path means, and reading it: nothing else of this package opens a file for a recipe."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokenprune.errors import did_you_mean
from tokenprune.recipe.merge import expand, inherit
from tokenprune.recipe.text.node import Node, Source, Spot, got
from tokenprune.recipe.text.problems import InvalidRecipeError, Problem
from tokenprune.recipe.text.yaml_reader import MAX_BYTES, decode, read_yaml, text_source

MAX_EXTENDS = 16
SUFFIXES = (".yaml", ".yml")
LEARNED, LOOPS = "learned", "loops"
GROUPS = ("baselines", LEARNED, LOOPS)
"""Folders of recipes beside the methods."""


@dataclass(frozen=True)
class Draft:
    """The recipe of one source with all that it extends below it, or what is left of it when something is wrong."""

    root: Node | None
    problems: list[Problem]


def shipped() -> dict[str, Path]:
    """Name to file, of the recipes that come with the package."""
    package = Path(str(files("tokenprune")))
    # An editable install has them beside the package, as the checkout does.
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), None)
    if folder is None:
        return {}
    found = [path for group in ("", *GROUPS) for path in sorted((folder / group).glob("*.yaml"))]
    return {path.stem: path for path in found}


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package and run on any model: the methods, then the baselines."""
    return [name for name, path in shipped().items() if path.parent.name not in (LEARNED, LOOPS)]


def list_learned_recipes() -> list[str]:
    """Names of the recipes that come with the package and have to be fitted to a model first (`tokenprune fit`)."""
    return [name for name, path in shipped().items() if path.parent.name == LEARNED]


def list_loop_recipes() -> list[str]:
    """Names of the recipes that come with the package and may ask a question twice (`again`)."""
    return [name for name, path in shipped().items() if path.parent.name == LOOPS]


def recipe_path(name: str) -> Path:
    """The file of a recipe that comes with the package.

    Raises:
        InvalidRecipeError: no recipe of that name.
    """
    known = shipped()
    if name not in known:
        raise InvalidRecipeError([Problem(name, None, None, _unknown(name, list(known)))])
    return known[name]


def is_path(source: str) -> bool:
    """Whether a text means a file: it has a folder or ends in .yaml."""
    return "/" in source or "\\" in source or source.lower().endswith(SUFFIXES)


def find(source: str | Path) -> Path:
    """The file that a user's text means, by name or by path.

    Raises:
        InvalidRecipeError: an unknown name.
    """
    return Path(source) if isinstance(source, Path) or is_path(source) else recipe_path(source)


def read_file(path: Path, shown: str) -> tuple[str, list[Problem]]:
    """The text of a regular file of a sensible size; `shown` is what messages call it."""

    def wrong(message: str) -> tuple[str, list[Problem]]:
        return "", [Problem(shown, None, None, message)]

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return wrong("this is a folder, expected a recipe file")
        if not stat.S_ISREG(mode):
            return wrong("this is not a regular file")
        with path.open("rb") as file:
            return decode(file.read(MAX_BYTES + 1), shown)
    except FileNotFoundError:
        return wrong(f"no such file{_near(path)}")
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return wrong(f"cannot be read: {reason}")


def load_file(path: Path, shown: str, chain: Sequence[Path] = ()) -> Draft:
    """The recipe in a file, over what it extends; `chain` are the files that led here."""
    text, problems = read_file(path, shown)
    if problems:
        return Draft(None, problems)
    return load_text(text, text_source(shown, text), path, chain)


def load_text(text: str, source: Source, path: Path | None = None, chain: Sequence[Path] = ()) -> Draft:
    """The recipe in a text, over what it extends; a text that is in no file may extend shipped recipes only."""
    root, problems = read_yaml(text, source)
    if root is None and not problems:
        problems = [Spot(source, 1, 1).problem("the recipe is empty: it starts with `version: 1`")]
    return Draft(root, problems) if root is None else over_base(root, problems, path, chain)


def over_base(root: Node, problems: list[Problem], path: Path | None = None, chain: Sequence[Path] = ()) -> Draft:
    """`root` over the recipe that it extends, if it does; `path` is its own file."""
    if not isinstance(root.value, dict):
        message = f"a recipe is a mapping that starts with `version: 1` (got {got(root.plain())})"
        return Draft(None, [*problems, root.at.problem(message)])
    root = expand(root)
    if "version" not in root.mapping:
        problems = [*problems, root.at.problem("missing required key 'version'")]
    extends = root.mapping.get("extends")
    if extends is None:
        return Draft(root, problems)
    rest = {key: node for key, node in root.mapping.items() if key != "extends"}
    own = Node(rest, root.at)
    base = _base(extends, path, chain)
    if base.root is None:
        return Draft(None, [*problems, *base.problems])
    return Draft(inherit(base.root, own), [*problems, *base.problems])


def _base(extends: Node, path: Path | None, chain: Sequence[Path]) -> Draft:
    target = _target(extends, path)
    if isinstance(target, Problem):
        return Draft(None, [target])
    here = [*chain, *([path] if path else [])]
    visited = [_real(file) for file in here]
    if _real(target) in visited or len(here) >= MAX_EXTENDS:
        names = " → ".join(file.name for file in (*here, target))
        kind = "a circle" if _real(target) in visited else "too long a chain"
        return Draft(None, [extends.at.problem(f"extends: {kind}: {names}")])
    layer = load_file(target, str(target), here)
    if layer.root is None and all(problem.line is None for problem in layer.problems):
        # Nothing to point at in there: the place to correct is here.
        return Draft(
            None, [extends.at.problem(f"extends: {problem.path}: {problem.message}") for problem in layer.problems]
        )
    return layer


def _target(extends: Node, path: Path | None) -> Path | Problem:
    """The file that `extends` means: a shipped recipe, or one in the folder of the file that says so."""
    value = extends.value
    if not isinstance(value, str) or not value:
        return extends.at.problem(
            f"extends: should be the name of a recipe or a file next to this one (got {got(extends.plain())})"
        )
    if not is_path(value) and value not in {".", ".."}:
        known = shipped()
        return known[value] if value in known else extends.at.problem(f"extends: {_unknown(value, list(known))}")
    if path is None:
        return extends.at.problem("extends: only a file can extend another file; this recipe is in none")
    root = path.parent
    target = root / value
    try:
        inside = target.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        return extends.at.problem(f"extends: {got(value)} cannot be followed: {error}")
    if not inside or Path(value).is_absolute():
        return extends.at.problem(f"extends: {got(value)} leads out of the folder of this recipe, which is not allowed")
    return target


def _real(path: Path) -> Path:
    return path.resolve()


def _unknown(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    names = ", ".join(known) or "none"
    return f"no recipe {name!r} comes with tokenprune{hint}; known: {names} (the path of a file ends in .yaml)"


def _near(path: Path) -> str:
    try:
        names = sorted(file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES)
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" (did you mean {str(path.with_name(near[0]))!r}?)" if near else ""
