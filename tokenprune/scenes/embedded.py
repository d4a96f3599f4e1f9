"""The files of the embedded model: where they are, how to load them and how to write them."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

ASSETS = Path(__file__).parent / "assets"


def embedded_path() -> Path:
    """Folder of the embedded model; `from_pretrained` of transformers takes it as it is."""
    return ASSETS / "embedded"


def load_embedded(folder: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded model in float32 and evaluation mode, and its processor; nothing is downloaded.

    Args:
        folder: weights of another run of the training, as `export` writes them; None takes the shipped ones.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = folder or embedded_path()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights (bfloat16), configuration and processor of `model` to `folder`; `model` stays as it is.

    Each file takes its place whole, when all of them have been written.
    """
    import torch

    from tokenprune.scenes.world.vocabulary import build_processor

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".tokenprune-", dir=folder.parent) as made:
        copy.deepcopy(model).cpu().to(torch.bfloat16).eval().save_pretrained(made)
        build_processor().save_pretrained(made)
        for file in Path(made).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only, and packages keep that
            file.replace(folder / file.name)
