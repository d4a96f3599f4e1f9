"""The embedded model: a stock `LlavaForConditionalGeneration` of about two million parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenprune.scenes.world.generate import UNITS
from tokenprune.scenes.world.vocabulary import ANSWER, BOS, EOS, IMAGE, PAD, PATCH, VISION_TOKENS, token_ids

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "mlp.fc2.weight")


def build_config(
    *,
    width: int = 128,
    layers: int = 8,
    heads: int = 4,
    mlp: int = 256,
    vision_width: int = 128,
    vision_layers: int = 3,
) -> LlavaConfig:
    """Configuration of the model; the defaults are those of the shipped weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    ids = token_ids()
    special = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=UNITS,
        patch_size=PATCH,
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )


def build_model(config: LlavaConfig | None = None, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """Untrained model in float32 with the initial scales below, reproducible for a `seed`."""
    from transformers import GenerationConfig, LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config or build_config())
        initialise(model)
    ids = token_ids()
    model.generation_config = GenerationConfig(
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        # A model of this size may open a second answer; <answer> ends the first one.
        eos_token_id=[ids[EOS], ids[ANSWER]],
    )
    return model.float()


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initial scales for training from scratch at width ~100.

    Token and position embeddings start as large as what blocks add to the residual stream; with the usual 0.02 they
    drown in it and learning stalls.
    """
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(std=0.7)
        elif "position_embedding" in name or "class_embedding" in name:
            parameter.normal_(std=0.5)
        elif "patch_embedding" in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 2:
            scale = 0.3 if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            parameter.normal_(std=scale * parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
