"""What a fit leaves: files of weights, and beside them a recipe that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenprune.core.files import whole_file
from tokenprune.parts.learned import Learned
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
            data = part.to_bytes(recipe=recipe.name, made_by=made_by)
            path = folder / f"{own}.safetensors"
            with whole_file(path) as file:
                file.write(data)
            settings["weights"] = f"{path.name}#{digest(data)}"
            paths.append(path)
    written = folder / f"{recipe.name}.yaml"
    with whole_file(written) as file:
        file.write(load_recipe(told).dump().encode())
    return written, tuple(paths)
