"""`anatomy`: the modules of one model that the engine hooks into."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.adapter import Adapter
from tokenprune.families.catalogue import adapter_of, families, fitting
from tokenprune.families.wrappers import base_model, text_model, unwrapped

RECURRENT = frozenset({"linear_attention", "conv"})
"""Of these, the ones without keys: they read tokens one after the other into a state of fixed size."""
LAYERS = frozenset({"full_attention", "sliding_attention"}) | RECURRENT
"""Types of decoder layers (`config.layer_types`) that the engine is exact for."""
FEED_FORWARDS = ("mlp", "feed_forward")
"""Attributes of a decoder layer that hold what it runs behind its attention."""
PLACEHOLDERS = ("image_token_id", "video_token_id")
"""What configurations call the ids that stand for vision tokens."""
IMAGE, VIDEO = 1, 2
"""Kinds of vision tokens."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The modules of one model that the engine hooks into."""

    adapter: Adapter
    model: nn.Module
    """What the user holds, or what that is wrapped around."""
    base: Any
    """Merges vision tokens into the text embeddings; its forward takes `input_ids`."""
    text: Any
    """The language model: `layers`, `rotary_emb`."""

    @property
    def current(self) -> bool:
        """Whether `text` is still the language model that `model` calls."""
        return text_model(self.model) is self.text

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.text.layers

    @cached_property
    def cache_name(self) -> str:
        """The argument of the language model and its layers that holds the cache: transformers 5.24 renamed it."""
        known = inspect.signature(type(self.text).forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    @cached_property
    def windowed(self) -> bool:
        """Whether some layer sees the last tokens alone."""
        config = self.text.config
        types = getattr(config, "layer_types", None)
        return "sliding_attention" in types if types else getattr(config, "sliding_window", None) is not None

    @cached_property
    def recurrent(self) -> frozenset[int]:
        """Indices of the layers that read tokens into a state, and have neither keys nor attention."""
        types = getattr(self.text.config, "layer_types", None) or ()
        return frozenset(index for index, kind in enumerate(types) if kind in RECURRENT)

    @cached_property
    def rotary_by_type(self) -> bool:
        """Whether layers of different types have rotary embeddings of their own (Gemma 3; Molmo 2, in two modules)."""
        several = sum(name.startswith("rotary_emb") for name, _ in self.text.named_children()) > 1
        return several or "layer_type" in inspect.signature(self.text.rotary_emb.forward).parameters

    @cached_property
    def counts_places(self) -> bool:
        """Whether queries are scaled by their position ids (Ministral 3), which then are more than distances."""
        return bool((getattr(self.text.config, "rope_parameters", None) or {}).get("llama_4_scaling_beta"))

    def feed_forward(self, index: int, *, asker: str) -> nn.Module:
        """What the decoder layer at `index` runs behind its attention, each token by itself.

        Args:
            index: of the layer.
            asker: what opens the message.

        Raises:
            UnsupportedModelError: the layer has none under a known name, or more than that runs behind its attention.
        """
        layer: Any = self.layers[index]
        found = next((module for name in FEED_FORWARDS if (module := getattr(layer, name, None)) is not None), None)
        if found is None or getattr(layer, "experts", None) is not None:
            known = f"expected it under {' or '.join(FEED_FORWARDS)}" if found is None else "experts run beside its mlp"
            raise UnsupportedModelError(
                f"{asker}: nobody knows where the feed-forward of layer {index} of {self.adapter.title} is "
                f"({type(layer).__name__}): {known}"
            )
        return found

    def vision_mask(self, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        """``[B, L]`` bool: the placeholders of image and video, by id, or by embedding when ids were not given."""
        return self.vision_kinds(input_ids, embeddings) > 0

    def vision_kinds(self, input_ids: Tensor | None, embeddings: Tensor) -> Tensor:
        """``[B, L]`` int8: 0 on text, `IMAGE` and `VIDEO` on placeholders; families with one for both have images."""
        found = torch.zeros(embeddings.shape[:2], dtype=torch.int8, device=embeddings.device)
        for kind, name in ((VIDEO, "video_token_id"), (IMAGE, "image_token_id")):
            token = getattr(self.base.config, name, None)
            if token is None:
                continue
            if input_ids is not None:
                here = (input_ids == token).to(found.device)
            else:
                placeholder = self.base.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
                here = (embeddings == placeholder).all(-1)
            found = found.masked_fill(here, kind)
        return found


HINT = (
    ". For a family of your own write an adapter (docs/your-own-family.md); "
    "for a VLM without transformers use tokenprune.build(recipe) on plain tensors"
)


def anatomy(model: nn.Module, adapter: Adapter | None = None) -> Anatomy:
    """Find the parts of `model`; what is wrapped around it (PEFT, DDP, torch.compile) is looked through.

    Args:
        model: or what is wrapped around one.
        adapter: of its family; None: the one that the catalogue has.

    Raises:
        UnsupportedModelError: a family that nobody adapted, an adapter of another one, a model without a decoder or
            placeholders, or a wrapper of several models.
    """
    known = families() if adapter is None else (str(getattr(adapter, "family", None)),)
    model = unwrapped(model, known)
    if adapter is None:
        adapter = adapter_of(model, asker="attach", hint=HINT)
    else:
        fitting(adapter, model, asker="attach")
    _check_members(model, adapter)
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if shared := getattr(text_config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"attach: {adapter.title} whose last {shared} layers read keys and values of earlier layers is not "
            "supported yet: those hold tokens that are dropped in between"
        )
    kinds = set(getattr(text_config, "layer_types", None) or ()) - LAYERS
    if kinds:
        raise UnsupportedModelError(
            f"attach: {adapter.family} with {', '.join(sorted(kinds))} layers is not supported yet"
        )
    text = text_model(model)
    base = base_model(model, text)
    _check_parts(text, base, adapter)
    return Anatomy(adapter, model, base, text)


def _check_members(model: Any, adapter: Adapter) -> None:
    """Raise `UnsupportedModelError` for a model without what leads to its parts."""
    missing = []
    if not callable(getattr(model, "get_decoder", None)):
        missing.append("get_decoder(), which returns the language model")
    if not callable(getattr(model.config, "get_text_config", None)):
        missing.append("config.get_text_config(), which returns the configuration of the language model")
    if missing:
        raise UnsupportedModelError(f"attach: {adapter.title}: {type(model).__name__} has no {'; no '.join(missing)}")


def _check_parts(text: Any, base: Any, adapter: Adapter) -> None:
    """Raise `UnsupportedModelError` for a language model, or a base model, that the engine cannot hook into."""
    missing = {
        "layers, the list of its decoder layers": isinstance(getattr(text, "layers", None), nn.ModuleList),
        "rotary_emb, the module that makes cos and sin of position ids": hasattr(text, "rotary_emb"),
        "config": hasattr(text, "config"),
    }
    for what, there in missing.items():
        if not there:
            raise UnsupportedModelError(
                f"attach: {adapter.title}: the language model, {type(text).__name__}, has no {what}"
            )
    config = getattr(base, "config", None)
    if all(getattr(config, name, None) is None for name in PLACEHOLDERS):
        raise UnsupportedModelError(
            f"attach: {adapter.title}: the configuration of {type(base).__name__} has neither "
            f"{' nor '.join(PLACEHOLDERS)}, the id that stands for a vision token in input_ids"
        )


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a call has told about its pictures."""

    pixels: tuple[int, int] | None = None
    """Height and width of each, where they came in one size ``[n, 3, H, W]``; None for tiles, patches, nothing."""
    sizes: Tensor | None = None
    """``[pictures, 2 or 3]``, the argument that `Adapter.sizes` names; None where it was not given."""

    def or_else(self, other: Pictures) -> Pictures:
        """What this call has told, and for the rest the other."""
        return Pictures(self.pixels or other.pixels, other.sizes if self.sizes is None else self.sizes)


def pictures_in(adapter: Adapter, kwargs: Mapping[str, Any]) -> Pictures:
    """What the arguments of `generate`, or of the model, tell about its pictures."""
    pixels, sizes = kwargs.get("pixel_values"), adapter.picture_sizes(kwargs)
    of_one_size = isinstance(pixels, Tensor) and pixels.dim() == 4
    return Pictures(
        pixels=(pixels.shape[2], pixels.shape[3]) if of_one_size else None,  # type: ignore[union-attr]
        sizes=None if sizes is None else torch.as_tensor(sizes),
    )
