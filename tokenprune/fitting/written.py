"""What a fit leaves: files of weights, and beside them a recipe that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.core.files import whole_file
from tokenprune.parts.learned import Learned
from tokenprune.parts.request import RequestHead
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.recipe.weights import digest
from tokenprune.stage import Stage


def learned_parts(stages: Sequence[Stage]) -> dict[str, Learned]:
    """The learned parts of some stages, by names of stage and role."""
    return {f"{stage.name}-{part.role}": part for stage in stages for part in stage.parts if isinstance(part, Learned)}


def write_weights(
    recipe: Recipe, parts: Mapping[str, Learned], folder: Path, *, made_by: str
) -> tuple[Path, tuple[Path, ...]]:
    """Write the weights of `parts` into `folder`, and `recipe` with their names.

    Args:
        recipe: whose learned parts they are.
        parts: as `learned_parts` gives them.
        folder: for both; it exists.
        made_by: what the files tell about themselves.

    Returns:
        The recipe, and the files of weights.
    """
    told = recipe.to_dict()
    paths = []
    for stage in told["stages"]:
        for role, settings in stage.items():
            part = parts.get(f"{stage['name']}-{role}")
            if part is None:
                continue
            own = recipe.name if len(parts) == 1 else f"{recipe.name}-{stage['name']}-{role}"
            path, settings["weights"] = _weights(recipe, part, folder / f"{own}.safetensors", made_by)
            paths.append(path)
    return _recipe(told, folder), tuple(paths)


def write_request(recipe: Recipe, head: RequestHead, folder: Path, *, made_by: str) -> tuple[Path, tuple[Path, ...]]:
    """Write the weights of a learned request into `folder`, and `recipe` with their name.

    Where the recipe had none, the probability of the first token no longer asks (``below: 0``): the request does.
    Arguments and what is returned are as for `write_weights`.
    """
    told = recipe.to_dict()
    if told["again"].get("weights") is None:
        told["again"]["below"] = 0.0
    path, told["again"]["weights"] = _weights(recipe, head, folder / f"{recipe.name}.safetensors", made_by)
    return _recipe(told, folder), (path,)


def _weights(recipe: Recipe, part: Learned, path: Path, made_by: str) -> tuple[Path, str]:
    """The file that was written, and its name as recipes have it."""
    data = part.to_bytes(recipe=recipe.name, made_by=made_by)
    with whole_file(path) as file:
        file.write(data)
    return path, f"{path.name}#{digest(data)}"


def _recipe(told: dict[str, Any], folder: Path) -> Path:
    made = load_recipe(told)
    written = folder / f"{made.name}.yaml"
    with whole_file(written) as file:
        file.write(made.dump().encode())
    return written
