"""The transformers model inside of what wraps it, and the modules of a model that the engine needs, found by structure.

PEFT, DDP and torch.compile hold the model in one of their modules and pass attributes on (`config`, `base_model`,
`get_decoder`, `generate`), so a wrapper looks like the model that it holds. Hooks on the wrapper itself would miss
calls that it passes on to the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tokenprune.errors import UnsupportedModelError


def unwrapped(model: Any, families: Collection[str]) -> Any:
    """The one model of `families` (their `model_type`) in `model`; `model` itself if it is one, or holds none.

    Raises:
        UnsupportedModelError: several are inside, or `model` is no module and only looks like one.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        if getattr(getattr(model, "config", None), "model_type", None) in families:
            raise UnsupportedModelError(
                f"attach: {kind} is no torch.nn.Module, but passes on the attributes of one; attach to the "
                "transformers model that it holds"
            )
        return model
    inside = {path: each for path, each in _outermost(model, "") if _family(each) in families}
    if len(inside) > 1:
        raise UnsupportedModelError(
            f"attach: {kind} holds {len(inside)} models, {' and '.join(inside)}; attach to each of them by itself"
        )
    return next(iter(inside.values()), model)


def text_model(model: Any) -> Any:
    """The module that owns the decoder layers of `model`, whatever is wrapped around it."""
    decoder = model.get_decoder()
    return next((module for module in decoder.modules() if "layers" in module._modules), decoder)


def base_model(model: Any, text: Any) -> Any:
    """The module of `model` that merges pictures into the prompt, and calls `text` or a wrapper of it."""
    names = next(name for name, module in model.named_modules() if module is text).split(".")
    parents = (model.get_submodule(".".join(names[:end])) for end in range(len(names) - 1, -1, -1))
    return next((module for module in parents if isinstance(module, PreTrainedModel)), model)


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """Models in `module` that are inside of no other, with their paths."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if isinstance(child, PreTrainedModel):
            yield at, child
        else:
            yield from _outermost(child, at)


def _family(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
