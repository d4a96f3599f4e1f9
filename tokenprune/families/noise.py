"""Prompts of noise: random pixels and random words of any size, for a model whose answers do not matter."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError
from tokenprune.families.catalogue import adapter_of


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
    return Pictures(adapter_of(config, asker="bench").picture(config, tokens))


def smaller_picture(config: Any, tokens: int) -> Pictures:
    """One picture of at most `tokens` vision tokens, as near to them and to a square as rows and columns allow."""
    return Pictures(adapter_of(config, asker="bench").smaller_picture(config, max(1, tokens)))


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
    adapter = adapter_of(config, asker="bench")
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
    inputs |= adapter.pixels(config, pictures.grids, ids, random, model.dtype)
    return {name: value.to(device) for name, value in inputs.items()}


def any_resolution(model: Any) -> AbstractContextManager[None]:
    """Let `model` take the sizes of `smaller_picture` until it closes; see `Adapter.any_resolution`."""
    return adapter_of(model, asker="bench").any_resolution(model.base_model)


def _words(config: Any, batch: int, text: int, random: torch.Generator) -> Tensor:
    """``[batch, text]`` ids of ordinary words: nothing that a model takes for a picture, or an end."""
    language = config.get_text_config()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = [getattr(config, name, None) for name in names]
    special += [getattr(language, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    known = {one for item in special for one in (item if isinstance(item, list) else [item]) if one is not None}
    words = torch.tensor([word for word in range(min(1000, language.vocab_size)) if word not in known])
    return words[torch.randint(len(words), (batch, text), generator=random)]
