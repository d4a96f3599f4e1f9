"""Aya Vision and Command A Vision: SigLIP, a pixel shuffle, Cohere 2 with windows."""

from __future__ import annotations

from typing import Any

import transformers as tf

from family_models.tiny import IMAGE, Square, Tiny, siglip, text

MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2


def words() -> Any:
    """Windows of 16 tokens in three layers of four; the fourth has no rotary embedding."""
    return tf.Cohere2Config(**text(sliding_window=16, layer_types=MIXED))


class AyaVision(Square):
    """A gated projector."""

    name, side, count = "aya_vision", 32, 16

    def config(self) -> tuple[Any, Any]:
        config = tf.AyaVisionConfig(
            vision_config=siglip(32), text_config=words(), image_token_index=IMAGE, downsample_factor=2
        )
        return tf.AyaVisionForConditionalGeneration, config


class Cohere2Vision(Square):
    """Command A Vision."""

    name, side, count = "cohere2_vision", 32, 16

    def config(self) -> tuple[Any, Any]:
        config = tf.Cohere2VisionConfig(
            vision_config=siglip(32),
            text_config=words(),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
        )
        return tf.Cohere2VisionForConditionalGeneration, config


MODELS: tuple[Tiny, ...] = (AyaVision(), Cohere2Vision())
