"""Where the weights that a recipe names are, and whether they are the ones that it means."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from tokenprune.errors import RecipeError, did_you_mean


def digest(data: bytes) -> str:
    """Twelve hexadecimal digits of a file of weights, as recipes name them behind ``#``."""
    return sha256(data).hexdigest()[:12]


def find_weights(reference: str, folder: Path | None, reader: str) -> Path:
    """The file that ``name.safetensors#digest`` means: beside the recipe, or one that comes with the package.

    Args:
        reference: as the recipe has it.
        folder: of the recipe; None for one that is in no file.
        reader: the part, as messages call it.

    Raises:
        RecipeError: no such file, or one of another digest.
    """
    name, _, wanted = reference.partition("#")
    shipped = Path(str(files("tokenprune"))) / "weights"
    folders = [shipped] if folder is None else [folder, shipped]
    found = [each / name for each in folders if (each / name).is_file()]
    if not found:
        near = did_you_mean(name, sorted(path.name for each in folders for path in each.glob("*.safetensors")))
        where = " or ".join(map(str, folders))
        raise RecipeError(f"{reader}: no weights {name} in {where}{near}; `tokenprune fit` makes them")
    digests = {digest(path.read_bytes()): path for path in reversed(found)}
    if wanted not in digests:
        got, path = next((got, path) for got, path in digests.items() if path == found[0])
        raise RecipeError(
            f"{reader}: {path} has the digest {got}, and the recipe means {wanted}: another file of the same name, "
            f"or changed weights; write {name}#{got} if they are meant"
        )
    return digests[wanted]
