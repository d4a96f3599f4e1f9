"""Models of real shapes with random weights: what takes time in a model is its shape, not what it has learned."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tokenprune.core.machine import free_memory
from tokenprune.cost.presets import PRESETS
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter
from tokenprune.families.catalogue import adapter_of, adapters
from tokenprune.families.load import EMBEDDED, Kernel, read_config


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
    if name in PRESETS:
        shape = PRESETS[name]
        adapter = adapters()[shape.family]
        config = adapter.published(shape)
    else:
        config = copy.deepcopy(read_config(name, also=(EMBEDDED, *PRESETS)))
        adapter = adapter_of(config, asker="sketch")
    if layers is not None:
        _deepen(adapter, config, layers)
    if width is not None:
        _widen(adapter, config, width)
    return config


def sketch_model(config: Any, *, dtype: torch.dtype, device: torch.device, attention: Kernel = "sdpa") -> Any:
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


def _deepen(adapter: Adapter, config: Any, layers: int) -> None:
    if layers < 1:
        raise InputError(f"layers: expected at least 1, got {layers}")
    text = config.get_text_config()
    ratio = layers / text.num_hidden_layers
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * layers
    adapter.deepen_tower(config, ratio)


def _widen(adapter: Adapter, config: Any, width: int) -> None:
    text = config.get_text_config()
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
    adapter.widen_tower(config, ratio)
