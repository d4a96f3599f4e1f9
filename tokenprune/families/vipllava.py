"""VipLLaVA: LLaVA-1.5 whose projector reads several layers of its tower."""

from __future__ import annotations

from typing import Any

from tokenprune.families.llava import Llava


class VipLlava(Llava):
    """LLaVA-1.5 but for the layers of the tower that the projector reads, and which the configuration names."""

    family = "vipllava"
    title = "VipLLaVA"
    pictures = "one square grid; the projector reads several layers of the tower"

    def joined(self, clip: Any, text: dict[str, Any], **more: Any) -> Any:
        import transformers as tf

        return tf.VipLlavaConfig(vision_config=clip, text_config=tf.LlamaConfig(**text), **more)
