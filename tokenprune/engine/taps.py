"""What decoder layers project, read as they run, for the stages that judge by their attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenprune.core.tokens import Attention, Tokens
from tokenprune.engine.forward import Forward
from tokenprune.engine.gather import take
from tokenprune.engine.projections import LayerInput, Turn, check_attention, rater_attention, rotary
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.adapter import Anatomy
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


class Taps:
    """Queries and keys of the layers before the places of `pipeline`, from hooks on their own projections.

    Args:
        anatomy: the model's modules.
        pipeline: its stages say whose attention they read.

    Raises:
        UnsupportedModelError: a layer without the projections, or a stage that reads the layer before layer 0.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline) -> None:
        self.layers: Any = anatomy.layers
        self.before: dict[int, Turn] = {}
        """Rotary embedding of each layer that a stage reads after it has run."""
        self.after: dict[int, Turn] = {}
        """The same, before it runs."""
        self.inputs: dict[int, LayerInput] = {}
        """Of the present forward: what entered the layers of `before` that ran last."""
        for stage, layer in zip(pipeline, pipeline.layers(len(self.layers)), strict=True):
            if "next" in stage.reads_attention:
                self.after[layer] = self._turn(layer)
            if "previous" in stage.reads_attention:
                if layer == 0:
                    raise UnsupportedModelError(
                        f"{stage.name} ({stage.place}): its scorer reads the attention of the layer before, "
                        "but nothing runs before layer 0; place it before a later layer, or use layer: next"
                    )
                self.before[layer - 1] = self._turn(layer - 1)

    def _turn(self, layer: int) -> Turn:
        check_attention(self.layers[layer])
        return rotary(self.layers[layer].self_attn)

    def mount(self) -> list[Any]:
        """Add the hooks; returns their handles."""
        handles = []
        for index in self.before:
            attention = self.layers[index].self_attn
            handles.append(attention.q_proj.register_forward_hook(self._query_hook(index)))
            handles.append(attention.k_proj.register_forward_hook(self._key_hook(index)))
        return handles

    def _query_hook(self, index: int) -> Callable[..., None]:
        def after_queries(module: nn.Module, args: Any, output: Tensor) -> None:
            source = self.inputs.get(index)
            if source is not None and source.hidden is None:
                source.queries = take(output, source.text, 1)

        return after_queries

    def _key_hook(self, index: int) -> Callable[..., None]:
        def after_keys(module: nn.Module, args: Any, output: Tensor) -> None:
            source = self.inputs.get(index)
            if source is not None and source.hidden is None:
                source.keys = output

        return after_keys

    def entering(
        self,
        index: int,
        kwargs: dict[str, Any],
        forward: Forward,
        store: Any | None,
        tokens: Tokens,
        text: Tensor,
        *,
        hidden: Tensor | None = None,
    ) -> None:
        """Layer `index` is about to run: remember what later stages need of it, and forget the layers before.

        Args:
            index: the layer.
            kwargs: what it is called with.
            forward: the present forward.
            store: its cache layer.
            tokens: the vision tokens that enter it.
            text: ``[B, T]`` where the text tokens that may rate stand in the sequence that enters it.
            hidden: ``[B, L, D]`` that enters it, where the layer runs elsewhere (engine/packed/generate.py).
        """
        self.inputs.clear()
        if index in self.before:
            # Without hidden states the layer projects queries and keys itself.
            self.inputs[index] = self._input(index, self.before[index], hidden, kwargs, forward, store, tokens, text)

    def attention(
        self,
        stage: Stage,
        index: int,
        hidden: Tensor,
        kwargs: dict[str, Any],
        forward: Forward,
        store: Any | None,
        tokens: Tokens,
        text: Tensor,
    ) -> Attention | None:
        """What `stage` before layer `index` may ask; arguments as in `entering`, `hidden` ``[B, L, D]`` enters it."""
        if not stage.reads_attention:
            return None
        following = None
        if "next" in stage.reads_attention:
            following = self._input(index, self.after[index], hidden, kwargs, forward, store, tokens, text)
        sources = {"next": following, "previous": self.inputs.get(index - 1)}
        return rater_attention(sources, tokens, None if stage.raters is None else stage.raters.most)

    def _input(
        self,
        index: int,
        turn: Turn,
        hidden: Tensor | None,
        kwargs: dict[str, Any],
        forward: Forward,
        store: Any | None,
        tokens: Tokens,
        text: Tensor,
    ) -> LayerInput:
        return LayerInput(
            layer=self.layers[index],
            turn=turn,
            hidden=hidden,
            rope=kwargs["position_embeddings"],
            mask=kwargs.get("attention_mask"),
            store=store,
            stored=forward.stored(store),
            text=text,
            tokens=tokens,
        )
