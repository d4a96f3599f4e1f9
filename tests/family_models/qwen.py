"""The Qwen families: a tower for pictures of any size, 2 x 2 patches a vision token, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, SEPARATOR, VIDEO, VISION_END, VISION_START, Size, Tiny, clear_patches, scale, text


class Grid(Tiny):
    """Pictures of any even number of patches of 4 x 4 pixels and 2 frames, ``[patches, 96]`` in one list."""

    sizes = ((8, 8), (8, 12), (12, 10), (4, 20))  # 16, 24, 30, 20 vision tokens
    marks = True
    kinds = "mm_token_type_ids"
    by_image = ("image_grid_thw",)

    def check(self, size: Size) -> None:
        if any(side % 2 for side in size):
            raise ValueError(f"image size {size} of {self.name}: expected even numbers of patches")

    def tokens(self, model: Any, size: Size) -> int:
        return size[0] * size[1] // 4

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        grid = torch.tensor([(1, *size) for size in images])
        return {"pixel_values": torch.randn(int(grid.prod(-1).sum()), 96, generator=random), "image_grid_thw": grid}

    def images(self, batch: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        patches = batch["image_grid_thw"].prod(-1)
        start, end = int(patches[:first].sum()), int(patches[:last].sum())
        return super().images(batch, first, last) | {"pixel_values": batch["pixel_values"][start:end]}


def joined(config_class: Any, vision: dict[str, Any], **words: Any) -> Any:
    """The configuration of a Qwen model."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return config_class(
        vision_config={"depth": 3, "num_heads": 2, "patch_size": 4, "hidden_size": 32, **vision},
        text_config=text(rope_parameters=rope, **words),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


class Qwen2(Grid):
    """Bias in q, k, v."""

    name = "qwen2_vl"

    def config(self) -> tuple[Any, Any]:
        return tf.Qwen2VLForConditionalGeneration, joined(tf.Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 64})


class Qwen2_5(Grid):
    """Bias in q, k, v; window attention in the vision tower but for its last block."""

    name = "qwen2_5_vl"

    def config(self) -> tuple[Any, Any]:
        vision = {"out_hidden_size": 64, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [2]}
        return tf.Qwen2_5_VLForConditionalGeneration, joined(tf.Qwen2_5_VLConfig, vision)


DEEP = {"out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}


class Qwen3(Grid):
    """Norms on q and k; DeepStack adds vision features after decoder layers 0 and 1."""

    name = "qwen3_vl"

    def config(self) -> tuple[Any, Any]:
        vision = DEEP | {"deepstack_visual_indexes": [0, 1]}
        return tf.Qwen3VLForConditionalGeneration, joined(tf.Qwen3VLConfig, vision, head_dim=16)


EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


class Qwen3Moe(Grid):
    """Qwen3-VL with four experts, of which two see each token."""

    name = "qwen3_vl_moe"

    def config(self) -> tuple[Any, Any]:
        vision = DEEP | {"deepstack_visual_indexes": [0, 1]}
        config = joined(tf.Qwen3VLMoeConfig, vision, head_dim=16, **EXPERTS)
        return tf.Qwen3VLMoeForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        clear_patches(model)


class Omni(Grid):
    """The part of an Omni model that reads and writes text; its position ids need no kinds of tokens."""

    kinds = None

    def joined(self, config_class: Any, vision: dict[str, Any], **words: Any) -> Any:
        config = joined(config_class, vision, **words).to_dict()
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": SEPARATOR}
        sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
        return config_class(**config | ids | {"audio_config": sound | {"output_dim": 64, "num_mel_bins": 8}})


class Qwen2_5Omni(Omni):
    """Qwen2.5-VL and a tower for sound."""

    name = "qwen2_5_omni_thinker"

    def config(self) -> tuple[Any, Any]:
        vision = {"out_hidden_size": 64, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [2]}
        return tf.Qwen2_5OmniThinkerForConditionalGeneration, self.joined(tf.Qwen2_5OmniThinkerConfig, vision)


class Qwen3Omni(Omni):
    """Qwen3-VL MoE and a tower for sound."""

    name = "qwen3_omni_moe_thinker"

    def config(self) -> tuple[Any, Any]:
        vision = DEEP | {"deepstack_visual_indexes": [0, 1]}
        config = self.joined(tf.Qwen3OmniMoeThinkerConfig, vision, head_dim=16, **EXPERTS)
        return tf.Qwen3OmniMoeThinkerForConditionalGeneration, config


LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2


def hybrid(config_class: Any, **words: Any) -> Any:
    """The configuration of a Qwen3.5: three layers of four are recurrent, and a quarter of each head is turned."""
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    words |= heads | {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "layer_types": LINEAR, "head_dim": 16}
    config = joined(config_class, DEEP, **words).to_dict()
    rope = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 10000.0}
    config["text_config"] |= {"rope_parameters": rope}
    return config_class(**config)


class Qwen3_5(Grid):
    """Gates beside the queries of the full layers."""

    name = "qwen3_5"

    def config(self) -> tuple[Any, Any]:
        return tf.Qwen3_5ForConditionalGeneration, hybrid(tf.Qwen3_5Config)


class Qwen3_5Moe(Grid):
    """Qwen3.5 with experts."""

    name = "qwen3_5_moe"
    rounds = True

    def config(self) -> tuple[Any, Any]:
        config = hybrid(tf.Qwen3_5MoeConfig, shared_expert_intermediate_size=32, **EXPERTS)
        return tf.Qwen3_5MoeForConditionalGeneration, config


class PaddleOcr(Grid):
    """Patches ``[patches, 3, 4, 4]``, and Ernie."""

    name = "paddleocr_vl"

    def config(self) -> tuple[Any, Any]:
        vision = {"num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32, "spatial_merge_size": 2}
        config = joined(tf.PaddleOCRVLConfig, vision | {"intermediate_size": 64}, head_dim=16)
        return tf.PaddleOCRVLForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        clear_patches(model)

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        made = super().noise(model, images, random)
        return made | {"pixel_values": made["pixel_values"][:, :48].reshape(-1, 3, 4, 4)}


class Kimi(Grid):
    """Latent attention: keys and values come from a narrow state."""

    name, kinds = "kimi_k25", None

    def config(self) -> tuple[Any, Any]:
        experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        words = text(num_key_value_heads=4, topk_group=1, first_k_dense_replace=1, **experts, **latent)
        places = {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4, "merge_kernel_size": (2, 2)}
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = tf.Kimi_K25Config(
            text_config=words | {"model_type": "deepseek_v3"},
            vision_config=tower | places | {"patch_size": 4},
            projection_hidden_size=32,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        return tf.Kimi_K25ForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        """`families.build` knows queries and keys by other names, and attention would be all but uniform."""
        scale(model, r"self_attn\.(q_b|kv_b)_proj\.weight", 4.0)

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        made = super().noise(model, images, random)
        return made | {"pixel_values": made["pixel_values"][:, :48].reshape(-1, 3, 4, 4)}


MODELS: tuple[Tiny, ...] = (
    Qwen2(),
    Qwen2_5(),
    Qwen3(),
    Qwen3Moe(),
    Qwen3_5(),
    Qwen3_5Moe(),
    Qwen2_5Omni(),
    Qwen3Omni(),
    PaddleOcr(),
    Kimi(),
)
