"""Models of real shapes with random weights: what takes time in a model is its shape, not what it has learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tokenprune.cost.presets import PRESETS
from tokenprune.cost.shape import ClipShape, ModelShape, QwenShape
from tokenprune.errors import InputError
from tokenprune.families.load import Attention, read_config

_TOWER_HEAD = {"llava": 64, "llava_next": 64}
"""Numbers per head of a vision tower; 80 in Qwen's."""


def sketch_config(name: str, *, layers: int | None = None, width: int | None = None) -> Any:
    """The configuration of a model of this shape, scaled if asked for.

    Args:
        name: a published shape (`tokenprune.cost.presets`), a folder or a hub id, of which only config.json is read.
        layers: decoder layers; the vision tower gets fewer or more in proportion.
        width: numbers per hidden state of the decoder, a multiple of its head size. Heads and MLP go in proportion, the
            vision tower too, so that each part keeps its share of the whole.

    Raises:
        InputError: no such model, or a width that the heads cannot share.
        UnsupportedModelError: a model of no supported family.
    """
    config = _preset(PRESETS[name]) if name in PRESETS else copy.deepcopy(read_config(name, also=tuple(PRESETS)))
    text, vision = config.get_text_config(), config.vision_config
    if layers is not None:
        _deepen(text, vision, layers)
    if width is not None:
        _widen(text, vision, width, config.model_type)
    return config


def sketch_model(config: Any, *, dtype: torch.dtype, device: torch.device, attention: Attention = "sdpa") -> Any:
    """A model of this configuration with random weights, the same each time, ready to run.

    Raises:
        InputError: it does not fit into the free memory of the device.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        blank = AutoModelForImageTextToText.from_config(config)
    parameters = sum(weight.numel() for weight in blank.parameters())
    _check_memory(parameters, dtype, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.is_file():
        return None
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _check_memory(parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    free = free_memory(device)
    need = parameters * dtype.itemsize
    if free is not None and need > 0.9 * free:
        smaller = "fewer --layers or a smaller --width"
        hint = smaller if dtype.itemsize <= 2 else f"--dtype bfloat16, or {smaller}"
        raise InputError(
            f"this model has {parameters / 1e9:.2f} billion parameters, {need / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {free / 2**30:.1f} GiB are free on {device}: try {hint}"
        )


def _deepen(text: Any, vision: Any, layers: int) -> None:
    if layers < 1:
        raise InputError(f"layers: expected at least 1, got {layers}")
    ratio = layers / text.num_hidden_layers
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * layers
    name = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    before = getattr(vision, name)
    # LLaVA reads the last layer but one: a tower has two at least.
    depth = max(2, round(before * ratio))
    setattr(vision, name, depth)
    for levels in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if getattr(vision, levels, None):
            places = dict.fromkeys(min(depth - 1, at * depth // before) for at in getattr(vision, levels))
            setattr(vision, levels, list(places)[:layers])


def _widen(text: Any, vision: Any, width: int, family: str) -> None:
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    if width < head or width % head:
        near = max(1, round(width / head)) * head
        raise InputError(f"width: expected a multiple of the head size {head}, got {width}; the nearest is {near}")
    group = heads // (getattr(text, "num_key_value_heads", None) or heads)
    ratio = width / text.hidden_size
    text.num_attention_heads = width // head
    text.num_key_value_heads = max(1, text.num_attention_heads // group)
    if text.num_attention_heads % text.num_key_value_heads:
        text.num_key_value_heads = 1
    text.intermediate_size = max(64, round(text.intermediate_size * ratio / 64) * 64)
    text.hidden_size = width
    tower = "embed_dim" if family == "qwen2_vl" else "hidden_size"
    before = getattr(vision, tower)
    size = before // vision.num_heads if hasattr(vision, "num_heads") else _TOWER_HEAD[family]
    size = min(size, before)
    wide = max(size, round(before * ratio / size) * size)
    setattr(vision, tower, wide)
    setattr(vision, "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads", wide // size)
    if getattr(vision, "intermediate_size", None):
        vision.intermediate_size = max(64, round(vision.intermediate_size * ratio / 4) * 4)
    if family == "qwen2_vl":
        vision.hidden_size = width
    elif hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = width


def _preset(shape: ModelShape) -> Any:
    """A transformers configuration of a published shape."""
    import transformers as tf

    decoder, vision = shape.decoder, shape.vision
    text = {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
        "max_position_embeddings": 32768,
    }
    special = {"image_token_id": decoder.vocab - 1, "video_token_id": decoder.vocab - 2}
    if isinstance(vision, QwenShape):
        halves = decoder.head_dim // 2
        sections = [halves // 4, halves * 3 // 8, halves * 3 // 8]
        rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections}
        tower = {
            "depth": vision.layers,
            "hidden_size": vision.width,
            "num_heads": vision.width // 80,
            "intermediate_size": vision.mlp,
            "out_hidden_size": decoder.width,
            "fullatt_block_indexes": list(vision.full),
        }
        marks = {"vision_start_token_id": decoder.vocab - 3, "vision_end_token_id": decoder.vocab - 4}
        return tf.Qwen2_5_VLConfig(
            vision_config=tower, text_config={**text, "rope_parameters": rope}, **special, **marks
        )
    assert isinstance(vision, ClipShape)
    clip = tf.CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.width // 64,
        image_size=14 * vision.side,
        patch_size=14,
    )
    if shape.family == "llava_next":
        language = tf.MistralConfig(**text, sliding_window=None)
        return tf.LlavaNextConfig(vision_config=clip, text_config=language, image_token_index=special["image_token_id"])
    language = tf.LlamaConfig(**text)
    return tf.LlavaConfig(vision_config=clip, text_config=language, image_token_index=special["image_token_id"])
