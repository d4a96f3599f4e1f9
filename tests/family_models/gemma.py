"""Gemma: SigLIP and decoders whose vision tokens see each other in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Size,
    Square,
    Tiny,
    calm_siglip,
    siglip,
    text,
    vit,
)

MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2


class Gemma3(Square):
    """Windows of 16 tokens in most layers, two rotary embeddings, norms on q and k; images see all of themselves."""

    name, side, count = "gemma3", 32, 16
    marks, kinds = True, "token_type_ids"

    def config(self) -> tuple[Any, Any]:
        heads = {"head_dim": 16, "query_pre_attn_scalar": 16}
        config = tf.Gemma3Config(
            text_config=tf.Gemma3TextConfig(**text(sliding_window=16, layer_types=MIXED, **heads)),
            vision_config=siglip(32),
            image_token_index=IMAGE,
            mm_tokens_per_image=16,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
        )
        return tf.Gemma3ForConditionalGeneration, config


class Gemma4(Tiny):
    """``[images, patches, 48]`` padded to the most patches, and the column and row of each; 2 x 2 patches a token.

    Heads twice as wide in full layers, and a second embedding of each token for each layer.
    """

    name, variant = "gemma4", "26B, 31B"
    sizes = ((8, 8), (8, 10), (6, 10))  # 16, 20, 15, in patches
    marks, kinds = True, "mm_token_type_ids"
    by_image = ("pixel_values", "image_position_ids")

    def config(self) -> tuple[Any, Any]:
        heads = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "layer_types": [*MIXED[:7], MIXED[2]]}
        second = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
        tower = vit(0, head_dim=16, global_head_dim=16, num_key_value_heads=2, num_hidden_layers=2)
        pooled = {"pooling_kernel_size": 2, "default_output_length": 20, "position_embedding_size": 64}
        config = tf.Gemma4Config(
            text_config=text(**heads, **second, use_bidirectional_attention="vision"),
            vision_config=tower | pooled,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            boi_token_id=VISION_START,
            eoi_token_id=VISION_END,
        )
        return tf.Gemma4ForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        """Attention is not scaled by the width of a head: trained norms of queries do that.

        Logits are as large as those of most families here, not 2.5 times as large: rounding is measured in them.
        """
        for layer in model.get_decoder().layers:
            layer.self_attn.q_norm.weight.mul_(0.125)
        model.get_decoder().norm.weight.mul_(0.4)

    def tokens(self, model: Any, size: Size) -> int:
        return size[0] * size[1] // 4

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        pixels = torch.zeros(len(images), 80, 48)
        places = torch.full((len(images), 80, 2), -1)
        for image, (height, width) in enumerate(images):
            n = height * width
            pixels[image, :n] = torch.rand(n, 48, generator=random)
            places[image, :n] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        return {"pixel_values": pixels, "image_position_ids": places}


class PaliGemma(Square):
    """Gemma, which sees the whole prompt from everywhere in it."""

    name, side, count = "paligemma", 16, 16
    kinds = "token_type_ids"

    def config(self) -> tuple[Any, Any]:
        config = tf.PaliGemmaConfig(
            text_config=tf.GemmaConfig(**text(head_dim=16)),
            vision_config=siglip(16),
            image_token_index=IMAGE,
            projection_dim=64,
            hidden_size=64,
            vocab_size=VOCAB,
        )
        return tf.PaliGemmaForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        calm_siglip(model)


MODELS: tuple[Tiny, ...] = (Gemma3(), Gemma4(), PaliGemma())
