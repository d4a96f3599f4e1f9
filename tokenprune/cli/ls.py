"""`tokenprune ls`: recipes, parts and models."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.options import Plugins
from tokenprune.cli.terminal import console, print_json, progress, table
from tokenprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

NAME = "ls"
EXAMPLES = (
    "  tokenprune ls                  all recipes",
    "  tokenprune ls 'sparsevlm*'     some of them",
    "  tokenprune ls parts            what recipes are made of",
    "  tokenprune ls models           the model families they work on",
)
KINDS = ("recipes", "parts", "models")
SECTIONS = {
    "methods": "",
    "learned": "learned: parts with weights, which `tokenprune fit` makes for a model",
    "loops": "loops: may ask a question twice, so `tokenprune run` and `tp.ask` take them",
}
"""Of recipes, and what stands above each."""


def command(
    what: Annotated[str, typer.Argument(help="recipes, parts, models; or a pattern for recipes.")] = "recipes",
    pattern: Annotated[str | None, typer.Argument(help="Only names that match, such as 'sparse*'.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Same as `ls parts`.")] = False,
    plugin: Plugins = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """List recipes, the parts that they are made of, or the model families that they work on."""
    if what not in KINDS:
        if pattern is not None:
            raise InputError(f"expected {', '.join(KINDS)} before a pattern, got {what!r}{did_you_mean(what, KINDS)}")
        what, pattern = "recipes", what
    if parts:
        what = "parts"
    with progress(f"reading {what}"):
        rows = {"recipes": _recipes, "parts": _parts, "models": _models}[what]()
    chosen = [row for row in rows if pattern is None or fnmatchcase(row["name"], pattern)]
    if not chosen:
        near = did_you_mean(pattern, [*(row["name"] for row in rows), *KINDS])
        raise InputError(f"no {what.removesuffix('s')} matches {pattern!r}{near}; see `tokenprune ls {what}`")
    if json_:
        print_json({what: chosen})
    else:
        {"recipes": _show_recipes, "parts": _show_parts, "models": _show_models}[what](chosen)


def _recipes() -> list[dict[str, Any]]:
    from tokenprune.recipe import list_learned_recipes, list_loop_recipes, list_recipes, load_recipe

    rows = []
    every = (list_recipes(), list_learned_recipes(), list_loop_recipes())
    for section, name in ((section, name) for section, names in zip(SECTIONS, every, strict=True) for name in names):
        recipe = load_recipe(name)
        rows.append(
            {
                "name": name,
                "section": section,
                "summary": recipe.summary,
                "paper": recipe.paper,
                "places": [str(stage.place) for stage in recipe.stages],
                "variants": list(recipe.variants),
                "fingerprint": recipe.fingerprint,
            }
        )
    return rows


def _show_recipes(rows: list[dict[str, Any]]) -> None:
    made = _recipe_table()
    before = "methods"
    for row in rows:
        if row["section"] != before:
            before = row["section"]
            console().print(made)
            console().print(f"\n[dim]{SECTIONS[before]}")
            made = _recipe_table()
        paper = (row["paper"] or "").removeprefix("arXiv:")
        made.add_row(f"[bold]{row['name']}", row["summary"], _stages(row["places"]), paper)
    console().print(made)
    console().print("\n[dim]stages: before which layer, as a share of the depth. More: tokenprune show NAME")


def _recipe_table() -> Table:
    made = table("recipe", "what it does", "stages", "paper")
    for column in (0, 2, 3):
        made.columns[column].no_wrap = True
    return made


def _stages(places: list[str]) -> str:
    """Places in short: ``after vision 1/2``, ``in vision 1/12 … 11/12`` (blocks of the tower, first and last)."""
    inside = [place.removeprefix("in_vision: block ") for place in places if place.startswith("in_vision")]
    ends = [inside[0], "…", inside[-1]] if len(inside) > 1 else inside
    others = [place.removeprefix("before_layer: ").replace("_", " ") for place in places[len(inside) :]]
    return " ".join([*(["in vision"] if inside else []), *ends, *others])


def _parts() -> list[dict[str, Any]]:
    from dataclasses import asdict

    from tokenprune.recipe import describe_part
    from tokenprune.registry import ROLES
    from tokenprune.registry import parts as registered

    return [asdict(describe_part(part)) for role in ROLES for part in registered(role).values()]


def _show_parts(rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    made = table("role", "part", "what it does, and its arguments")
    made.columns[1].no_wrap = True
    before = ""
    for row in rows:
        arguments = ", ".join(
            argument["name"] + ("" if argument["default"] is None else f"={argument['default']}")
            for argument in row["args"]
        )
        told = Text(row["summary"]).append(f"\n{arguments}" if arguments else "", style="dim")
        made.add_row(row["role"] if row["role"] != before else "", f"[bold]{row['name']}", told)
        before = row["role"]
    console().print(made)


def _models() -> list[dict[str, Any]]:
    from tokenprune.families.catalogue import adapters

    return [{"name": adapter.family, "title": adapter.title} for adapter in adapters().values()]


def _show_models(rows: list[dict[str, Any]]) -> None:
    made = table("model_type", "family")
    for row in rows:
        made.add_row(f"[bold]{row['name']}", row["title"])
    console().print(made)
    console().print("\n[dim]A VLM of your own: tokenprune.build(recipe) gives its stages for plain tensors.")
