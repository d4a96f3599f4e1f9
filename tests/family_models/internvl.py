"""InternVL: its own tower, a pixel shuffle of 2 x 2 patches to a vision token, Qwen 2 or Qwen 3."""

from __future__ import annotations

from typing import Any

import transformers as tf

from family_models.tiny import IMAGE, Square, Tiny, scale, text, vit


class InternVL(Square):
    """InternVL 3: Qwen 2."""

    name, side, count, variant = "internvl", 32, 16, "Qwen 2"

    def config(self) -> tuple[Any, Any]:
        return tf.InternVLForConditionalGeneration, self.joined(tf.Qwen2Config(**text()))

    def joined(self, words: Any) -> Any:
        vision = tf.InternVLVisionConfig(**vit(32) | {"image_size": [32, 32], "patch_size": [4, 4]})
        return tf.InternVLConfig(
            vision_config=vision, text_config=words, image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
        )


class InternVL3_5(InternVL):
    """InternVL 3.5: Qwen 3, with norms on q and k."""

    name, variant = "internvl 3.5", "Qwen 3"

    def config(self) -> tuple[Any, Any]:
        return tf.InternVLForConditionalGeneration, self.joined(tf.Qwen3Config(**text(head_dim=16)))

    def finish(self, model: Any) -> None:
        """Norms on q and k undo what `families.build` does to their weights."""
        scale(model, r"language_model.*q_norm\.weight", 1.5)


MODELS: tuple[Tiny, ...] = (InternVL(), InternVL3_5())
