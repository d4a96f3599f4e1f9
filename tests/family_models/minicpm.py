"""MiniCPM-V 4.6: a tower that joins 2 x 2 patches half way, a merger that joins them once more, and Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.qwen import hybrid
from family_models.tiny import IMAGE, VIDEO, Size, Tiny, vit


class MiniCPMV(Tiny):
    """``[1, 3, 4, patches * 4]``, the patches of all pictures side by side, and their rows and columns of patches."""

    name = "minicpmv4_6"
    sizes = ((16, 16), (16, 20), (12, 20))  # 16, 20, 15, in patches
    by_image = ("target_sizes",)
    rounds = True

    def config(self) -> tuple[Any, Any]:
        config = tf.MiniCPMV4_6Config(
            vision_config=vit(64, num_hidden_layers=3),
            text_config=hybrid(tf.Qwen3_5Config).text_config,
            insert_layer_id=1,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return tf.MiniCPMV4_6ForConditionalGeneration, config

    def tokens(self, model: Any, size: Size) -> int:
        return size[0] * size[1] // 16

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        patches = sum(height * width for height, width in images)
        pixels = torch.randn(1, 3, 4, patches * 4, generator=random)
        return {"pixel_values": pixels, "target_sizes": torch.tensor(images, dtype=torch.int32)}

    def images(self, batch: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        patches = 4 * batch["target_sizes"].prod(-1)
        start, end = int(patches[:first].sum()), int(patches[:last].sum())
        return super().images(batch, first, last) | {"pixel_values": batch["pixel_values"][..., start:end]}


MODELS: tuple[Tiny, ...] = (MiniCPMV(),)
