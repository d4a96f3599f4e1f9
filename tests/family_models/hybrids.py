"""LFM2-VL and MiniCPM-V 4.6: decoders of recurrent and of full layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, Size, Tiny, text, vit


class Lfm2VL(Tiny):
    """``[images, patches, 48]`` padded to the most patches; a pixel unshuffle of 2 x 2 patches; short convolutions."""

    name = "lfm2_vl"
    sizes = ((8, 8), (8, 10), (6, 10))  # 16, 20, 15, in patches
    by_image = ("pixel_values", "spatial_shapes", "pixel_attention_mask")

    def config(self) -> tuple[Any, Any]:
        layers = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "full_attention"]
        tower = vit(0, num_patches=64, vision_use_head=False, num_hidden_layers=2)
        config = tf.Lfm2VlConfig(
            text_config=tf.Lfm2Config(**text(layer_types=layers)),
            vision_config=tf.Siglip2VisionConfig(**tower),
            image_token_id=IMAGE,
            projector_hidden_size=32,
            downsample_factor=2,
        )
        return tf.Lfm2VlForConditionalGeneration, config

    def tokens(self, model: Any, size: Size) -> int:
        return size[0] * size[1] // 4

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        pixels, there = torch.zeros(len(images), 80, 48), torch.zeros(len(images), 80, dtype=torch.long)
        for image, (height, width) in enumerate(images):
            n = height * width
            pixels[image, :n], there[image, :n] = torch.randn(n, 48, generator=random), 1
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor(images), "pixel_attention_mask": there}


MODELS: tuple[Tiny, ...] = (Lfm2VL(),)
