"""Prompts of noise: random pixels and random words of any size, for a model whose answers do not matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.tokens import Grid
from tokenprune.errors import InputError, UnsupportedModelError

LLAVA = "llava"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Pictures:
    """What a prompt shows: the grids of its pictures, in vision tokens."""

    grids: tuple[Grid, ...]

    @property
    def tokens(self) -> int:
        return sum(math.prod(grid) for grid in self.grids)


def usual_pictures(config: Any, tokens: int | None = None) -> Pictures:
    """Pictures of `tokens` vision tokens as the model takes them: whole pictures of its one size, or one of that size.

    Args:
        config: of the model.
        tokens: vision tokens; LLaVA's one picture, or 576 where a picture may have any size, when left out.

    Raises:
        InputError: no number of whole pictures has so many tokens.
        UnsupportedModelError: a family that this module makes no pictures for.
    """
    family = _family(config)
    if family in QWEN:
        return Pictures(((1, *_sides(576 if tokens is None else tokens, exact=True)),))
    side = config.vision_config.image_size // config.vision_config.patch_size
    many, left = divmod(side**2 if tokens is None else tokens, side**2)
    if left or not many:
        near = max(1, round((tokens or 0) / side**2)) * side**2
        raise InputError(f"tokens: a picture of this model has {side**2} vision tokens, got {tokens}; try {near}")
    return Pictures(((1, side, side),) * many)


def smaller_picture(config: Any, tokens: int) -> Pictures:
    """One picture of at most `tokens` vision tokens, as near to them and to a square as rows and columns allow."""
    _family(config)
    return Pictures(((1, *_sides(max(1, tokens), exact=False)),))


def noise(model: Any, pictures: Pictures, *, text: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model.forward` and `generate` on its device: pictures, then words, the same for the same seed.

    Args:
        model: a supported model.
        pictures: of each sample.
        text: other tokens of each prompt: four before the pictures, the rest behind, one between two pictures.
        batch: samples.
        seed: of pixels and words.

    Raises:
        InputError: too few words for so many pictures.
        UnsupportedModelError: a family that this module makes no pictures for.
    """
    config, device = model.config, model.device
    family = _family(config)
    between = len(pictures.grids) - 1
    if text < between + 5:
        raise InputError(f"text: {between + 1} pictures need at least {between + 5} other tokens, got {text}")
    random = torch.Generator().manual_seed(seed)
    image = int(config.image_token_id)
    words = _words(config, batch, text, random)
    parts = [words[:, :4]]
    for number, grid in enumerate(pictures.grids):
        parts += [words[:, 4 : 4 + min(1, number)], torch.full((batch, math.prod(grid)), image)]
    ids = torch.cat([*parts, words[:, 4 + between :]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == LLAVA:
        patch = config.vision_config.patch_size
        _, rows, columns = pictures.grids[0]
        size = (batch * len(pictures.grids), 3, rows * patch, columns * patch)
        inputs["pixel_values"] = torch.randn(size, generator=random).to(model.dtype)
    else:
        inputs |= _patches(config, pictures, batch, random, model.dtype)
        inputs["mm_token_type_ids"] = (ids == image).long()
    return {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def any_resolution(model: Any) -> Iterator[None]:
    """Let a tower with a fixed grid take pictures of other sizes: it interpolates its position embeddings."""
    tower = getattr(model.base_model, "vision_tower", None)
    if tower is None:
        yield
        return
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _family(config: Any) -> str:
    family = str(config.model_type)
    if family != LLAVA and family not in QWEN:
        raise UnsupportedModelError(
            f"bench makes no pictures for {family}, whose tiles depend on the picture; supported: "
            f"{', '.join((LLAVA, *QWEN))}"
        )
    return family


def _words(config: Any, batch: int, text: int, random: torch.Generator) -> Tensor:
    """``[batch, text]`` ids of ordinary words: nothing that a model takes for a picture, or an end."""
    language = config.get_text_config()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = [getattr(config, name, None) for name in names]
    special += [getattr(language, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    known = {one for item in special for one in (item if isinstance(item, list) else [item]) if one is not None}
    words = torch.tensor([word for word in range(min(1000, language.vocab_size)) if word not in known])
    return words[torch.randint(len(words), (batch, text), generator=random)]


def _patches(
    config: Any, pictures: Pictures, batch: int, random: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    vision = config.vision_config
    merge = int(vision.spatial_merge_size)
    numbers = int(getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2)
    grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in pictures.grids] * batch)
    patches = torch.randn(int(grid.prod(-1).sum()), numbers, generator=random)
    return {"pixel_values": patches.to(dtype), "image_grid_thw": grid}


def _sides(tokens: int, *, exact: bool) -> tuple[int, int]:
    """Rows and columns of a rectangle of `tokens`; where it need not be exact, none more than twice as wide as high."""
    if exact:
        rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        return rows, tokens // rows
    rows, columns = max(
        ((rows, min(2 * rows, tokens // rows)) for rows in range(1, math.isqrt(tokens) + 1)),
        key=lambda sides: (sides[0] * sides[1], sides[0]),
    )
    return rows, columns
