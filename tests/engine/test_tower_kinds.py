"""Every kind of vision tower: attention read beside SDPA is that of eager attention, and patches go where projectors
put them. On towers of transformers as they are, without a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from family_models.tiny import IMAGE, text
from torch import Tensor, nn
from towers import reading
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger

import tokenprune as tp
from tokenprune.engine.tower_attention import BlockCall, class_attention, mount, received_attention
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.tower import find_tower, last_read, patches_along

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
KINDS: dict[str, tuple[Any, Callable[[], Any], int, bool]] = {
    "clip": (tf.CLIPVisionModel, lambda: tf.CLIPVisionConfig(**TINY), 1, True),
    "siglip": (tf.SiglipVisionModel, lambda: tf.SiglipVisionConfig(**TINY), 0, False),
    "internvit": (
        tf.InternVLVisionModel,
        lambda: tf.InternVLVisionConfig(**TINY | {"image_size": [24, 24], "patch_size": [4, 4]}, use_qk_norm=True),
        1,
        True,
    ),
    "pixtral": (tf.PixtralVisionModel, lambda: tf.PixtralVisionConfig(**TINY), 0, False),
    "dinov2": (tf.Dinov2Model, lambda: tf.Dinov2Config(**TINY), 1, True),
    "dinov2_registers": (
        tf.Dinov2WithRegistersModel,
        lambda: tf.Dinov2WithRegistersConfig(**TINY, num_register_tokens=3),
        4,
        True,
    ),
    "vit": (tf.ViTModel, lambda: tf.ViTConfig(**TINY), 1, True),
}


def towers(kind: str) -> tuple[Any, Any]:
    """The same weights with SDPA and with eager attention; large enough that attention is not even."""
    model_class, config, _, _ = KINDS[kind]
    made = []
    for attention in ("sdpa", "eager"):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = model_class._from_config(config(), attn_implementation=attention)
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight) * (0.3 if weight.dim() > 1 else 0.1) + (weight.dim() == 1) * 0.7)
        made.append(model.eval())
    return made[0], made[1]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_eager_attention(kind: str) -> None:
    model, eager = towers(kind)
    _, _, prefix, class_token = KINDS[kind]
    tower = find_tower(model)
    assert (tower.depth, tower.prefix, tower.class_token) == (2, prefix, class_token)
    calls: list[BlockCall] = []
    handles = [handle for attention in tower.attentions for handle in mount(attention, calls.append)]
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        model(pixels)
        matrices = eager(pixels, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    assert len(calls) == len(matrices) == 2
    for call, matrix in zip(calls, matrices, strict=True):
        each = matrix.float().mean(1)
        own = each.sum(1) / (each > 0).sum(1)  # Pixtral packs pictures, which do not see each other
        assert (received_attention(call, None) - own).abs().max() < 1e-5
        assert own.std() > 1e-3
        if class_token:
            assert (class_attention(call) - each[:, 0]).abs().max() < 1e-5
        assert call.keys().shape[2:] == (2, 16)


def one_hot(patches: int) -> Tensor:
    return torch.eye(patches)


def test_pixel_shuffle_is_undone() -> None:
    """InternVL: which patches a vision token is made of, by the model's own function."""
    grids = [(1, 2, 3), (1, 2, 3)]
    patches = 2 * 4 * 6
    rows = one_hot(patches).view(2, 4, 6, patches)
    shuffled = InternVLModel.pixel_shuffle(None, rows, 0.5).reshape(2, -1, 4, patches)
    tower = find_tower(towers("internvit")[0], side=2)
    assert torch.allclose(tower.to_tokens(one_hot(patches), grids), shuffled.mean(2).flatten(0, 1))


def test_mistrals_merger_is_followed() -> None:
    """Mistral 3: pictures of different sizes, whose patches its merger folds into one row each."""
    config = tf.Mistral3Config(vision_config=tf.PixtralVisionConfig(**TINY), spatial_merge_size=2)
    patches = 4 * 6 + 2 * 8
    merger = Mistral3PatchMerger(config)
    merger.merging_layer = nn.Identity()
    config.vision_config.hidden_size = patches
    folded = merger(one_hot(patches), torch.tensor([(16, 24), (8, 32)])).view(-1, patches, 4)
    tower = find_tower(towers("pixtral")[0], side=patches_along(config))
    assert torch.allclose(tower.to_tokens(one_hot(patches), [(1, 2, 3), (1, 1, 4)]), folded.mean(-1))


def test_configurations_name_what_is_read() -> None:
    config = tf.LlavaConfig(vision_feature_layer=-2)
    assert (last_read(config, 24), patches_along(config)) == (22, 1)
    config = tf.LlavaConfig(vision_feature_layer=[-2, 5])
    assert last_read(config, 24) == 22
    assert patches_along(tf.InternVLConfig()) == 2
    assert patches_along(tf.Qwen2_5_VLConfig()) == 2
    assert patches_along(tf.Idefics3Config()) == 2


def test_what_does_not_fit_is_refused() -> None:
    tower = find_tower(towers("internvit")[0], side=2)
    with pytest.raises(InputError, match=r"24 patches came out of InternVLVisionModel, but the pictures .* have 28"):
        tower.to_tokens(torch.zeros(24), [(1, 1, 7)])
    with pytest.raises(UnsupportedModelError, match="Linear has no list of blocks whose attention projects"):
        find_tower(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("vision", "strategy"),
    [
        (lambda: tf.SiglipVisionConfig(**TINY | {"image_size": 20}), "full"),
        (lambda: tf.CLIPVisionConfig(**TINY | {"image_size": 20}), "full"),
    ],
    ids=["siglip", "clip-full"],
)
def test_llava_with_other_towers(vision: Callable[[], Any], strategy: str) -> None:
    """SigLIP, without a class token; and a class token that is itself a vision token."""
    config = tf.LlavaConfig(
        vision_config=vision(),
        text_config=tf.LlamaConfig(**text(num_hidden_layers=2)),
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
    )
    model: Any = tf.LlavaForConditionalGeneration(config).eval()
    clip = config.vision_config.model_type == "clip_vision_model"
    tokens = 25 + clip
    ids = torch.tensor([[5, 6, *[IMAGE] * tokens, 7, 8]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 20, 20)}
    stage = reading("class_attention", "hidden")
    with tp.attach(model, tp.Pipeline([stage])) as attached, torch.no_grad():
        model(**batch)
    scorer: Any = stage.scorer
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
    if clip:
        assert attached.report.notes == ()
    else:
        assert "SiglipVisionModel has no class token" in attached.report.notes[0]
    assert scorer.got["class_attention"].shape == (1, tokens)
    if config.vision_config.model_type != "siglip_vision_model":  # its last hidden state is normed
        assert torch.allclose(scorer.got["hidden"], states, atol=1e-5)
