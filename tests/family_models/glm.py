"""GLM-4V and its successors: Qwen's grids and M-RoPE, half of each head turned."""

from __future__ import annotations

from typing import Any

import transformers as tf

from family_models.qwen import Grid
from family_models.tiny import IMAGE, VIDEO, VISION_END, VISION_START, Tiny, text


def joined(config_class: Any, **words: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {"depth": 3, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
    return config_class(
        vision_config=vision | {"image_size": 32, "out_hidden_size": 64},
        text_config=text(rope_parameters=rope, **words),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    )


class Glm4v(Grid):
    """GLM-4.1V: bias in q, k, v, norms behind attention and MLP."""

    name, expands = "glm4v", False

    def config(self) -> tuple[Any, Any]:
        return tf.Glm4vForConditionalGeneration, joined(tf.Glm4vConfig)


class Glm46v(Glm4v):
    """GLM-4.6V Flash."""

    name = "glm46v"

    def config(self) -> tuple[Any, Any]:
        return tf.Glm46VForConditionalGeneration, joined(tf.Glm46VConfig, model_type="glm4v_text")


class Glm4vMoe(Glm4v):
    """GLM-4.5V: experts behind the first layer."""

    name = "glm4v_moe"

    def config(self) -> tuple[Any, Any]:
        experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        words = experts | {"topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}
        return tf.Glm4vMoeForConditionalGeneration, joined(tf.Glm4vMoeConfig, **words)


class GlmOcr(Glm4v):
    """GLM-OCR."""

    name = "glm_ocr"

    def config(self) -> tuple[Any, Any]:
        return tf.GlmOcrForConditionalGeneration, joined(tf.GlmOcrConfig, head_dim=16)


MODELS: tuple[Tiny, ...] = (Glm4v(), Glm46v(), Glm4vMoe(), GlmOcr())
