"""LLaVA and its descendants: CLIP or SigLIP, a projector, Llama, Mistral or Qwen 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from family_models.tiny import IMAGE, VIDEO, Size, Square, Tiny, calm_siglip, clip, siglip, text

TILES = [[8, 16], [16, 8], [16, 16], [8, 24], [24, 8]]


class Llava(Square):
    """CLIP and Llama, no grouped queries, as LLaVA-1.5."""

    name, side, count = "llava", 20, 25

    def config(self) -> tuple[Any, Any]:
        words = tf.LlamaConfig(**text(num_key_value_heads=4))
        config = tf.LlavaConfig(vision_config=clip(20), text_config=words, image_token_index=IMAGE, image_seq_length=25)
        return tf.LlavaForConditionalGeneration, config


class VipLlava(Square):
    """The projector reads several layers of the tower."""

    name, side, count = "vipllava", 20, 25

    def config(self) -> tuple[Any, Any]:
        words = tf.LlamaConfig(**text())
        config = tf.VipLlavaConfig(
            vision_config=clip(20), text_config=words, image_token_index=IMAGE, vision_feature_layers=[-2, 1]
        )
        return tf.VipLlavaForConditionalGeneration, config


class VideoLlava(Square):
    """Two towers: one for images, one for video."""

    name, side, count = "video_llava", 20, 25

    def config(self) -> tuple[Any, Any]:
        words = tf.LlamaConfig(**text())
        config = tf.VideoLlavaConfig(
            vision_config=clip(20), text_config=words, image_token_index=IMAGE, video_token_index=VIDEO
        )
        return tf.VideoLlavaForConditionalGeneration, config


class LlavaNext(Tiny):
    """CLIP on 8-pixel tiles (2 x 2 tokens each) and Mistral without sliding window, as LLaVA-1.6 Mistral."""

    name = "llava_next"
    sizes = ((16, 16), (16, 8), (8, 24), (8, 14))  # 24, 16, 18, 14: tiles, one newline a row, unpadding

    def config(self) -> tuple[Any, Any]:
        words = tf.MistralConfig(**text(sliding_window=None))
        config = tf.LlavaNextConfig(
            vision_config=clip(8), text_config=words, image_token_index=IMAGE, image_grid_pinpoints=TILES
        )
        return tf.LlavaNextForConditionalGeneration, config

    def tokens(self, model: Any, size: Size) -> int:
        """The model itself lays out the tiles, unpads, adds newlines."""
        tiles = torch.empty(_tile_count(model, size), 4, 1)
        return int(model.model.pack_image_features([tiles], [list(size)], "default", torch.empty(1))[1])

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        tiles = [torch.randn(_tile_count(model, size), 3, 8, 8, generator=random) for size in images]
        pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(images)}


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT with Llama and a pooling of frames."""

    name = "llava_next_video"

    def config(self) -> tuple[Any, Any]:
        config = tf.LlavaNextVideoConfig(
            vision_config=clip(8),
            text_config=tf.LlamaConfig(**text()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=TILES,
        )
        return tf.LlavaNextVideoForConditionalGeneration, config


class LlavaOnevision(LlavaNext):
    """SigLIP, the tiles of LLaVA-NeXT, Qwen 2."""

    name = "llava_onevision"

    def config(self) -> tuple[Any, Any]:
        config = tf.LlavaOnevisionConfig(
            vision_config=siglip(8),
            text_config=tf.Qwen2Config(**text()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=TILES,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
        return tf.LlavaOnevisionForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        calm_siglip(model)

    def tokens(self, model: Any, size: Size) -> int:
        tiles = torch.empty(_tile_count(model, size), 4, 1)
        return int(model.model.pack_image_features([tiles], [list(size)], torch.empty(1))[1])


def _tile_count(model: Any, size: Size) -> int:
    """Tiles of one image, the overview included."""
    return image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, 8)


MODELS: tuple[Tiny, ...] = (Llava(), LlavaNext(), LlavaNextVideo(), LlavaOnevision(), VipLlava(), VideoLlava())
