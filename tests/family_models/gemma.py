"""Gemma: SigLIP and decoders whose vision tokens see each other in both directions."""

from __future__ import annotations

from typing import Any

import transformers as tf

from family_models.tiny import IMAGE, VISION_END, VISION_START, VOCAB, Square, Tiny, siglip, text

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


MODELS: tuple[Tiny, ...] = (Gemma3(), PaliGemma())
