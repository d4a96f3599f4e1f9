"""The feed-forwards of decoder layers, and hooks on them that let some tokens pass by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenprune.engine.hooks import Spot
from tokenprune.engine.skipping import Skipping
from tokenprune.engine.traces import post_hook, pre_hook
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import Anatomy
from tokenprune.pipeline import Pipeline


class FeedForwards:
    """The feed-forwards from the place of a stage with ``dropped: skip_ffn`` on, and their hooks.

    Args:
        anatomy: the model's modules.
        pipeline: its last stage may let tokens skip; without one there is nothing to hook.
        skipping: what skips in the calling thread's forward at its present layer; None: nothing.

    Raises:
        UnsupportedModelError: a layer whose feed-forward is not known, or that has no attention to stay in.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline, skipping: Callable[[], Skipping | None]) -> None:
        self.anatomy = anatomy
        self._skipping = skipping
        depth = len(anatomy.layers)
        self.layers = range(depth, depth)
        """Those whose feed-forward is skipped."""
        for stage, layer in zip(pipeline, pipeline.layers(depth), strict=True):
            if not stage.skips:
                continue
            self.layers = range(layer, depth)
            self._told = f"{stage.name} ({stage.place}): dropped: skip_ffn"
            recurrent = [index for index in self.layers if index in anatomy.recurrent]
            if recurrent:
                raise UnsupportedModelError(
                    f"{self._told}: layer {recurrent[0]} of {anatomy.adapter.title} is recurrent: it reads all tokens "
                    "into one state, and text cannot be kept from what it has read; expected dropped: leave"
                )
        self.spots()

    def spots(self) -> list[Spot]:
        """Where hooks belong, and which, in the layers that the model has now."""
        found: list[Spot] = []
        for index in self.layers:
            module = self.anatomy.feed_forward(index, asker=self._told)
            # Whoever else hooks the module sees what it computes: ours come first before it, and last behind it.
            found += [(module, partial(pre_hook, hook=self._before, prepend=True))]
            found += [(module, partial(post_hook, hook=self._after))]
        return found

    def check(self, *, flash: bool) -> None:
        """Raise `UnsupportedModelError` for a forward in which tokens cannot skip.

        Args:
            flash: whether attention runs on a flash kernel.
        """
        if not self.layers:
            return
        if flash:
            raise UnsupportedModelError(
                f"{self._told}: some tokens are hidden from text alone, and a flash kernel takes no such mask; load "
                "the model with attn_implementation='sdpa' or 'eager'"
            )
        again = (layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.anatomy.layers)
        if torch.is_grad_enabled() and any(again):
            raise UnsupportedModelError(
                f"{self._told}: under gradient checkpointing a layer runs once more in the backward pass, when nobody "
                "knows what skips; turn it off (model.gradient_checkpointing_disable()), or expected dropped: leave"
            )

    # Without keyword arguments: see LayerHooks.
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        skipping = self._skipping()
        if skipping is None or kwargs is None:
            return None
        if args:
            return (skipping.shortened(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": skipping.shortened(kwargs["hidden_states"])}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        skipping = self._skipping()
        if skipping is None:
            return None
        if isinstance(output, tuple):  # some mixtures of experts return what their router says, too
            return (skipping.lengthened(output[0]), *output[1:])
        return skipping.lengthened(output)
