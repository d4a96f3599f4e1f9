"""`tokenprune schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.terminal import check_folder, write_text

NAME = "schema"
EXAMPLES = (
    "  tokenprune schema --output tokenprune.json",
    "  # then, in the first line of a recipe:",
    "  # yaml-language-server: $schema=tokenprune.json",
)


def command(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.", metavar="FILE")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes: editors then complete names and underline mistakes while you type.

    It covers the parts of all packages that are installed now.
    """
    if output is not None:
        check_folder(output, "--output")
    from tokenprune.recipe import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_text(output, text, "--output")
