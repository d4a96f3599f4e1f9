"""`tokenprune new`: a recipe to start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.terminal import check_folder, write_text
from tokenprune.errors import InputError

NAME = "new"
EXAMPLES = (
    "  tokenprune new my.yaml",
    "  tokenprune new --from sparsevlm-v1.5 mine.yaml",
    "  tokenprune new | less",
)

STARTER = """\
# A recipe: which vision tokens survive, where, and how many.
#   tokenprune check {file}              is it valid?
#   tokenprune show {file}               tokens per layer, every part explained
#   tokenprune run --recipe {file}       try it
#   tokenprune ls parts                  all parts and their arguments
version: 1
name: {name}
summary: Two stages, text tokens judge vision tokens.

# What the whole recipe may cost. One of, each a share of the image's vision tokens (0.33) or a count (192):
#   keep     average over the layers from the first place on
#   average  average over all layers
#   final    tokens that are left after the last stage
# or flops, a share of the multiply-adds of the untouched prefill.
# Override it with --keep, --average, --final, --flops. Higher keeps more, 1.0 keeps all.
budget: {{keep: 0.33}}

stages:
  # place: the first layer (0-based) that sees fewer tokens. A share of the depth (10%, 3/32) fits models of any depth;
  # `place: after_vision` acts on the projector's output. Later places are safer and save less.
  - place: {{before_layer: 10%}}
    # raters: the text tokens whose opinion counts. above_mean: those that resemble the image; all_text; last_text.
    raters: above_mean
    # scorer: what each vision token is worth, here the attention that raters pay to it. `rope: false` looks past
    # position, which otherwise favours tokens near the question.
    scorer: {{type: attention, rope: true}}
    # scheduler: how many stay. `solved` follows the budget above; {{type: fixed, keep: 0.5}} needs none.
    scheduler: solved
    # sampler: which ones stay. top_k takes the best; uniform, random and union spread over the picture.
    sampler: top_k
    # recycler: what becomes of the rest. drop forgets them; cluster keeps summaries of the best of them.
    recycler: drop

  - place: {{before_layer: 50%}}
    raters: above_mean
    scorer: {{type: attention, rope: true}}
    # share: size of this stage relative to the others; higher keeps more here and less before.
    scheduler: {{type: solved, share: 0.4}}
    sampler: top_k
    recycler: drop
"""


def command(
    file: Annotated[
        Path | None, typer.Argument(help="Where to write it; stdout when left out.", metavar="FILE")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--from", help="Copy this shipped recipe, with its comments.", metavar="RECIPE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Write a commented recipe to start from: a template, or a copy of a shipped recipe."""
    if file is not None:
        check_folder(file, "FILE")
        if file.exists() and not force:
            raise InputError(f"{file} exists; --force overwrites it")
    name = _name(file)
    if base is None:
        text = STARTER.format(name=name, file=file or "FILE")
    else:
        text = _copy(base, name)
    if file is None:
        typer.echo(text, nl=False)
        return
    write_text(file, text, "FILE")
    typer.echo(f"wrote {file}; next: tokenprune show {file}", err=True)


def _name(file: Path | None) -> str:
    """A name for the recipe, from that of the file."""
    stem = "" if file is None else file.stem.lower()
    return re.sub(r"[^a-z0-9.]+", "-", stem).strip("-.") or "my-recipe"


def _copy(base: str, name: str) -> str:
    """The text of a shipped recipe under a new name."""
    from tokenprune.recipe import load_recipe, recipe_path

    load_recipe(base)  # an unknown name is told here, with the nearest one
    text = recipe_path(base).read_text(encoding="utf-8")
    return re.sub(r"^name:.*$", lambda _: f"name: {name}  # from {base}", text, count=1, flags=re.MULTILINE)
