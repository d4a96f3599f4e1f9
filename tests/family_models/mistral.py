"""Mistral 3, Ministral 3, LightOnOCR: Pixtral's tower for pictures of any size, words between the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, SEPARATOR, VISION_END, Size, Tiny, text, vit


class Pixtral(Tiny):
    """``[images, 3, H, W]`` padded to the largest, and `image_sizes`; 8 x 8 pixels a vision token."""

    sizes = ((32, 32), (32, 40), (24, 40))  # 16, 20, 15

    def tokens(self, model: Any, size: Size) -> int:
        return size[0] // 8 * (size[1] // 8)

    def placeholders(self, model: Any, size: Size) -> Tensor:
        row = [IMAGE] * (size[1] // 8) + [SEPARATOR]
        return torch.tensor([*(row * (size[0] // 8))[:-1], VISION_END])

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        pixels = torch.zeros(len(images), 3, *(max(side) for side in zip(*images, strict=True)))
        for own, (height, width) in zip(pixels, images, strict=True):
            own[:, :height, :width] = torch.randn(3, height, width, generator=random)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(images)}


def tower() -> Any:
    return tf.PixtralVisionConfig(**vit(64), head_dim=16)


class Mistral3(Pixtral):
    """Mistral without windows."""

    name, variant = "mistral3", "Mistral"

    def config(self) -> tuple[Any, Any]:
        return tf.Mistral3ForConditionalGeneration, self.joined(tf.MistralConfig(**text(sliding_window=None)))

    def joined(self, words: Any) -> Any:
        return tf.Mistral3Config(
            vision_config=tower(),
            text_config=words,
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        )


class Ministral3(Mistral3):
    """Queries are scaled by their position ids."""

    name, variant = "ministral3", "Ministral"
    rounds = True

    def config(self) -> tuple[Any, Any]:
        scaled = {"factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5}
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, **scaled}
        words = tf.Ministral3Config(**text(head_dim=16, sliding_window=None, rope_parameters=rope))
        return tf.Mistral3ForConditionalGeneration, self.joined(words)


class LightOnOcr(Pixtral):
    """Qwen 3."""

    name = "lighton_ocr"

    def config(self) -> tuple[Any, Any]:
        words = tf.Qwen3Config(**text(head_dim=16))
        config = tf.LightOnOcrConfig(
            vision_config=tower(), text_config=words, image_token_id=IMAGE, spatial_merge_size=2
        )
        return tf.LightOnOcrForConditionalGeneration, config


MODELS: tuple[Tiny, ...] = (Mistral3(), Ministral3(), LightOnOcr())
