"""What the engine must know of a model family: where its parts are, and how its vision tokens lie on a grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.core.tokens import Grid
from tokenprune.errors import InputError, UnsupportedModelError, did_you_mean


@dataclass(frozen=True, eq=False)
class VisionRow:
    """The vision tokens of one sample, on the host: what a family's grid function reads."""

    runs: tuple[int, ...]
    """Lengths of the uninterrupted runs of vision tokens, in order."""
    positions: np.ndarray | None
    """``[3, n]`` M-RoPE ids (time, height, width) of the vision tokens; None where the family has plain positions."""
    newline: tuple[bool, ...] | None
    """For each vision token whether it is the row separator of LLaVA-NeXT; None elsewhere."""
    pixels: tuple[int, int] | None
    """Height and width of each picture, where the model was given pictures of one size; else None."""


def picture_size(pixels: Any) -> tuple[int, int] | None:
    """Height and width of pictures ``[n, 3, H, W]``; None for what is none: tiles, patches, nothing."""
    return (pixels.shape[2], pixels.shape[3]) if isinstance(pixels, Tensor) and pixels.dim() == 4 else None


@dataclass(frozen=True)
class Adapter:
    """A model family. Most need only a grid function."""

    family: str
    """`config.model_type` of the full model."""
    title: str
    """Name for people."""
    grids: Callable[[nn.Module, VisionRow], tuple[Grid, ...]]
    """(T, H, W) of each image of a sample."""
    deepstack: str | None = None
    """Method of the text model that adds vision features to early layers, at original indices (Qwen3-VL)."""
    newline: str | None = None
    """Attribute of the base model: the embedding that ends a row of a tiled image (LLaVA-NeXT)."""


def _fixed_grids(base: Any, row: VisionRow) -> tuple[Grid, ...]:
    """LLaVA-1.5: every image is one rectangle of the vision tower's patches; as a rule the square it was trained on."""
    vision = base.config.vision_config
    height, width = row.pixels or (vision.image_size, vision.image_size)
    rows, columns = height // vision.patch_size, width // vision.patch_size
    n, whole = sum(row.runs), rows * columns
    if not whole or n % whole:
        raise InputError(
            f"expected whole images of {rows} x {columns} = {whole} vision tokens, got {n} in one sample; "
            "was the prefill cut into chunks?"
        )
    return ((1, rows, columns),) * (n // whole)


def _tiled_grids(base: Any, row: VisionRow) -> tuple[Grid, ...]:
    """LLaVA-NeXT: per image a square overview, then the unpadded tiles, each of their rows ended by a newline token."""
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size
    newline, at, n = row.newline, 0, sum(row.runs)
    assert newline is not None
    grids: list[Grid] = []
    while at < n:
        grids.append((1, side, side))
        at += side**2
        if at >= n or not any(newline[at:]):
            raise InputError("the tiles of an image are incomplete; was the prefill cut into chunks?")
        width = newline.index(True, at) - at + 1
        rows = 0
        while at + width <= n and newline[at + width - 1] and not any(newline[at : at + width - 1]):
            rows, at = rows + 1, at + width
        grids.append((1, rows, width))
    return tuple(grids)


def _positioned_grids(base: nn.Module, row: VisionRow) -> tuple[Grid, ...]:
    """Qwen-VL: M-RoPE ids are the grid. One image (or stretch of video) per run of vision tokens."""
    if row.positions is None:
        raise InputError(
            "vision tokens without three-axis position ids: pass mm_token_type_ids and image_grid_thw, "
            "as the processor gives them"
        )
    grids: list[Grid] = []
    at = 0
    for run in row.runs:
        ids = row.positions[:, at : at + run]
        height, width = (int(axis.max() - axis.min()) + 1 for axis in ids[1:])
        frames = run // (height * width)
        if frames * height * width != run:
            raise InputError(
                f"{run} vision tokens are no whole grid of {height} x {width}; was the prefill cut into chunks?"
            )
        grids.append((frames, height, width))
        at += run
    return tuple(grids)


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("llava", "LLaVA-1.5", _fixed_grids),
    Adapter("llava_next", "LLaVA-NeXT", _tiled_grids, newline="image_newline"),
    Adapter("qwen2_vl", "Qwen2-VL", _positioned_grids),
    Adapter("qwen2_5_vl", "Qwen2.5-VL", _positioned_grids),
    Adapter("qwen3_vl", "Qwen3-VL", _positioned_grids, deepstack="_deepstack_process"),
)
"""The supported families; docs/models.md says what is tested for each."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The modules of one model that the engine hooks into."""

    adapter: Adapter
    model: nn.Module
    """What the user holds."""
    base: Any
    """Merges vision tokens into the text embeddings; its forward takes `input_ids`."""
    text: Any
    """The language model: `layers`, `rotary_emb`."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.text.layers

    @cached_property
    def cache_name(self) -> str:
        """The argument of the language model and its layers that holds the cache: transformers 5.24 renamed it."""
        known = inspect.signature(type(self.text).forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    def vision_mask(self, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        """``[B, L]`` bool: the placeholders of image and video, by id, or by embedding when ids were not given."""
        found = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        for name in ("image_token_id", "video_token_id"):
            token = getattr(self.base.config, name, None)
            if token is None:
                continue
            if input_ids is not None:
                found |= (input_ids == token).to(found.device)
            else:
                placeholder = self.base.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
                found |= (embeddings == placeholder).all(-1)
        return found


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`.

    Raises:
        UnsupportedModelError: a family that nobody adapted, or a model without a decoder.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    known = {adapter.family: adapter for adapter in ADAPTERS}
    if family not in known:
        got = type(model).__name__ if family is None else f"{type(model).__name__} (model_type {family!r})"
        raise UnsupportedModelError(
            f"attach: no adapter for {got}{did_you_mean(family, known)}; supported: {', '.join(known)}. "
            "For an own VLM use tokenprune.build(recipe) on plain tensors"
        )
    text_config = config.get_text_config()  # type: ignore[union-attr]
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise UnsupportedModelError(f"attach: {family} with {', '.join(sorted(kinds))} layers is not supported yet")
    base = model.base_model
    text = model.get_decoder()  # type: ignore[operator]
    return Anatomy(known[family], model, base, text)
