"""Idefics 2 and 3, SmolVLM: pictures cut into tiles, with text between them, and Llama or Mistral."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, SEPARATOR, Size, Tiny, text, vit


class Tiled(Tiny):
    """``[B, tiles, 3, side, side]``, all zeros where a sample has fewer tiles; sizes are rows and columns of tiles."""

    side = 24
    count = 9
    """Vision tokens of a tile."""
    sizes = ((1, 1), (1, 2))  # 9 tokens; 27, of two tiles and the whole picture

    def tiles(self, size: Size) -> int:
        return 1 if size == (1, 1) else size[0] * size[1] + 1

    def tokens(self, model: Any, size: Size) -> int:
        return self.count * self.tiles(size)

    def placeholders(self, model: Any, size: Size) -> Tensor:
        one = torch.cat([torch.tensor([SEPARATOR]), torch.full((self.count,), IMAGE)])
        return torch.cat([one.repeat(self.tiles(size)), torch.tensor([SEPARATOR])])

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        tiles = sum(map(self.tiles, images))
        return {"pixel_values": torch.randn(tiles, 3, self.side, self.side, generator=random)}

    def pixels(self, model: Any, rows: Sequence[Sequence[Size]], random: torch.Generator) -> dict[str, Tensor]:
        samples = [self.noise(model, images, random)["pixel_values"] for images in rows]
        return {"pixel_values": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)}

    def row(self, batch: Any, b: int) -> dict[str, Tensor]:
        pixels = batch["pixel_values"][b : b + 1]
        real = (pixels != 0).flatten(2).any(-1)[0]
        return {"pixel_values": pixels[:, real]} if real.any() else {}


class Idefics3(Tiled):
    """A pixel shuffle of 2 x 2 patches."""

    name = "idefics3"

    def config(self) -> tuple[Any, Any]:
        words = tf.LlamaConfig(**text())
        config = tf.Idefics3Config(vision_config=vit(24), text_config=words, image_token_id=IMAGE, scale_factor=2)
        return tf.Idefics3ForConditionalGeneration, config


class SmolVLM(Tiled):
    """As Idefics 3."""

    name = "smolvlm"

    def config(self) -> tuple[Any, Any]:
        words = tf.LlamaConfig(**text())
        config = tf.SmolVLMConfig(vision_config=vit(24), text_config=words, image_token_id=IMAGE, scale_factor=2)
        return tf.SmolVLMForConditionalGeneration, config


class Idefics2(Tiled):
    """Nine learned queries read the patches of each tile."""

    name = "idefics2"

    def config(self) -> tuple[Any, Any]:
        queries = {"resampler_n_latents": 9, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
        config = tf.Idefics2Config(
            vision_config=vit(24),
            perceiver_config={**queries, "num_key_value_heads": 2, "hidden_size": 64},
            text_config=tf.MistralConfig(**text(sliding_window=None)),
            image_token_id=IMAGE,
        )
        return tf.Idefics2ForConditionalGeneration, config


MODELS: tuple[Tiny, ...] = (Idefics2(), Idefics3(), SmolVLM())
