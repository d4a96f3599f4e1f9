"""Families without relatives here: one tower, one projector, and a decoder that other files know."""

from __future__ import annotations

from typing import Any

import transformers as tf

from family_models.tiny import IMAGE, VOCAB, Square, Tiny, calm_siglip, clear_patches, siglip, text, vit


class DeepseekVL(Square):
    """SigLIP and Llama."""

    name, side, count = "deepseek_vl", 16, 16

    def config(self) -> tuple[Any, Any]:
        config = tf.DeepseekVLConfig(
            text_config=tf.LlamaConfig(**text()), vision_config=siglip(16), image_token_id=IMAGE
        )
        return tf.DeepseekVLForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        calm_siglip(model)


class DeepseekVLHybrid(Square):
    """SigLIP and SAM, which sees the picture at a higher resolution."""

    name, side, count = "deepseek_vl_hybrid", 16, 16
    by_image = ("pixel_values", "high_res_pixel_values")

    def config(self) -> tuple[Any, Any]:
        sam = {"output_channels": 16, "patch_size": 16, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 4}
        config = tf.DeepseekVLHybridConfig(
            text_config=tf.LlamaConfig(**text()),
            vision_config=siglip(16),
            high_res_vision_config=vit(128, num_hidden_layers=2) | sam,
            image_token_id=IMAGE,
        )
        return tf.DeepseekVLHybridForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        calm_siglip(model)

    def noise(self, model: Any, images: Any, random: Any) -> Any:
        import torch

        high = torch.randn(len(images), 3, 128, 128, generator=random)
        return super().noise(model, images, random) | {"high_res_pixel_values": high}


class Janus(Square):
    """A SigLIP of its own and Llama; it draws pictures too, by a tower that nothing here runs."""

    name, side, count = "janus", 16, 16

    def config(self) -> tuple[Any, Any]:
        vision = vit(16, num_hidden_layers=2, projection_dim=64, num_image_tokens=16, depth=1)
        codes = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "num_patches": 4}
        sizes = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "num_hidden_layers": 1, "image_token_embed_dim": 64}
        config = tf.JanusConfig(
            text_config=tf.LlamaConfig(**text()),
            vision_config=vision,
            vq_config={**codes, **sizes, "projection_dim": 64},
            image_token_id=IMAGE,
        )
        return tf.JanusForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        clear_patches(model)


class Ovis2(Square):
    """A vision token is a weighted sum of a table of visual words."""

    name, side, count = "ovis2", 16, 16

    def config(self) -> tuple[Any, Any]:
        config = tf.Ovis2Config(
            text_config=tf.Qwen2Config(**text()),
            vision_config=vit(16, vocab_size=40, hidden_stride=1),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[190, 191, 192, 193, 194],
            vocab_size=VOCAB,
            hidden_size=64,
        )
        return tf.Ovis2ForConditionalGeneration, config


class Aria(Square):
    """Sixteen learned queries read 64 patches; experts in the decoder."""

    name, side, count = "aria", 32, 16

    def config(self) -> tuple[Any, Any]:
        experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32}
        config = tf.AriaConfig(
            text_config=tf.AriaTextConfig(**text(**experts)),
            vision_config={"model_type": "idefics3_vision", **vit(32)},
            image_token_index=IMAGE,
            projector_patch_to_query_dict={64: 16},
        )
        return tf.AriaForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        clear_patches(model)


MODELS: tuple[Tiny, ...] = (DeepseekVL(), DeepseekVLHybrid(), Janus(), Ovis2(), Aria())
