"""FastVLM and Perception-LM, whose towers come from timm, which tests do not need: others stand in for them here.

No tower of timm shows where its blocks are, so nothing inside them is read, and what is tested is the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, VIDEO, Size, Square, Tiny, calm_siglip, clear_patches, clip, text


class FastVlm(Square):
    """A tower of stages, as FastViT, whose output is a map of features; Qwen 2."""

    name, side, count = "fast_vlm", 32, 16

    def config(self) -> tuple[Any, Any]:
        stages = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "sr_ratios": [2, 1]}
        vision = tf.SegformerConfig(
            **stages, num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2]
        )
        vision.hidden_size = 32  # as the configuration of timm's calls it
        config = tf.FastVlmConfig(
            vision_config=vision, text_config=tf.Qwen2Config(**text()), image_token_index=IMAGE, image_seq_length=16
        )
        return tf.FastVlmForConditionalGeneration, config


class PerceptionLM(Square):
    """``[tiles, 1, 3, 32, 32]``: a tower with a class token, 2 x 2 patches averaged; Llama."""

    name, side, count = "perception_lm", 32, 16

    def config(self) -> tuple[Any, Any]:
        vision = clip(32)
        vision.architecture, vision.model_args = "vit_tiny_patch4_32", {"embed_dim": 32, "img_size": [32, 32]}
        config = tf.PerceptionLMConfig(
            vision_config=vision,
            text_config=tf.LlamaConfig(**text()),
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
        return tf.PerceptionLMForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        calm_siglip(model)
        clear_patches(model)

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": super().noise(model, images, random)["pixel_values"][:, None]}


MODELS: tuple[Tiny, ...] = (FastVlm(), PerceptionLM())
