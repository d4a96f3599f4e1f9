"""`tokenprune check`: everything wrong with recipe files, with file, line and column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokenprune.cli.options import Plugins
from tokenprune.cli.terminal import complain, print_json, progress
from tokenprune.errors import TokenPruneError

if TYPE_CHECKING:
    from tokenprune.recipe import Problem

NAME = "check"
EXAMPLES = (
    "  tokenprune check my.yaml",
    "  tokenprune check recipes/*.yaml --format github    in a GitHub workflow",
    "  tokenprune check my.yaml --json | jq .ok",
)


def command(
    files: Annotated[list[str], typer.Argument(help="Recipe files.", metavar="FILE...")],
    plugin: Plugins = None,
    style: Annotated[
        Literal["text", "json", "github"], typer.Option("--format", help="github: annotations of a workflow run.")
    ] = "text",
    json_: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
) -> int:
    """Check recipes: reports every problem at once as file:line:column, with the nearest valid name.

    Each variant of a recipe is checked too. Ends with status 2 when anything is wrong, so that it fits a pre-commit
    hook or a CI job.
    """
    with progress("checking"):
        results = [_check(file) for file in files]
    problems = [problem for result in results for problem in result["problems"]]
    if json_ or style == "json":
        from dataclasses import asdict

        told = [{**result, "problems": [asdict(problem) for problem in result["problems"]]} for result in results]
        print_json({"ok": not problems, "files": told})
    else:
        _report(results, problems, style)
    return 2 if problems else 0


def _report(results: list[dict[str, Any]], problems: list[Problem], style: str) -> None:
    from tokenprune.recipe import format_problems

    if style == "github":
        if problems:
            typer.echo(format_problems(problems, "github"))
        return
    for result in results:
        if not result["problems"]:
            variants = f", variants {', '.join(result['variants'])}" if result["variants"] else ""
            typer.echo(f"{result['file']}: ok, {result['recipe']} {result['fingerprint']}{variants}")
    if problems:
        complain(format_problems(problems))
        found = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        wrong = sum(bool(result["problems"]) for result in results)
        typer.echo(f"{found} in {wrong} of {len(results)} file{'s' * (len(results) > 1)}", err=True)


def _check(file: str) -> dict[str, Any]:
    """What became of one file: the recipe, or its problems. Variants are checked with it."""
    from tokenprune.recipe import InvalidRecipeError, Problem, load_recipe

    told: dict[str, Any] = {"file": file, "recipe": None, "fingerprint": None, "variants": [], "problems": []}
    try:
        recipe = load_recipe(Path(file))
        told |= {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "variants": list(recipe.variants)}
    except InvalidRecipeError as error:
        told["problems"] = list(error.problems)
    except TokenPruneError as error:
        told["problems"] = [Problem(file, None, None, str(error))]
    return told
