"""What decoder layers compute, read as they run, for the stages that judge by it: queries, keys, hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.core.needs import earlier_signal
from tokenprune.core.signals import Question, Signal
from tokenprune.core.tokens import Attention, Tokens
from tokenprune.engine.gather import take
from tokenprune.engine.glimpse import Glimpses
from tokenprune.engine.hooks import Spot
from tokenprune.engine.layer_call import LayerCall
from tokenprune.engine.projections import (
    LayerInput,
    Turn,
    check_attention,
    columns,
    keys_of,
    rater_attention,
    rotary,
    unturned,
    vision_queries,
)
from tokenprune.engine.state import Threads
from tokenprune.engine.traces import post_hook, pre_hook
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import Anatomy
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


class Taps:
    """Queries, keys and hidden states of the layers before the places of `pipeline`, from hooks.

    Args:
        anatomy: the model's modules.
        pipeline: its stages say what they read.
        threads: whose forwards they belong to.

    Raises:
        UnsupportedModelError: a layer without the projections, or a stage that reads a layer before layer 0.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline, threads: Threads) -> None:
        self.anatomy = anatomy
        self.threads = threads
        self.previous: dict[int, Turn] = {}
        """Layer index to rotary embedding, for layers whose queries and keys are tapped while they run."""
        self.queries: set[int] = set()
        """Layers of `previous` of which queries of vision tokens are read, too."""
        self.next: dict[int, Turn] = {}
        """Layer index to rotary embedding, for layers whose queries and keys are computed early, before they run."""
        self.earlier: dict[int, int] = {}
        """Layer index to the last layer before which a stage reads the hidden states that entered it."""
        for stage, layer in zip(pipeline, pipeline.layers(len(anatomy.layers)), strict=True):
            _check_reads(stage, layer)
            if "next" in stage.reads.attention:
                self.next[layer] = self._turn(layer)
            if "previous" in stage.reads.attention or stage.reads.projections or stage.reads.glimpse:
                self.previous[layer - 1] = self._turn(layer - 1)
            if stage.reads.layer_queries:
                self.queries.add(layer - 1)
            for back in stage.reads.earlier:
                self.earlier[layer - back] = max(layer, self.earlier.get(layer - back, 0))
        self.glimpses = Glimpses(anatomy, pipeline, threads)
        self._bound = self._attentions()

    def _turn(self, layer: int) -> Turn:
        anatomy = self.anatomy
        if layer in anatomy.recurrent:
            others = ", ".join(str(index) for index in range(len(anatomy.layers)) if index not in anatomy.recurrent)
            raise UnsupportedModelError(
                f"layer {layer} of {anatomy.adapter.title} is recurrent and has no attention that raters could pay; "
                f"these have: {others}. A scorer reads the layer before its place, or with layer: next the one "
                "behind it"
            )
        if anatomy.counts_places:
            raise UnsupportedModelError(
                f"{anatomy.adapter.title} scales its queries by their position ids: rater attention is not computed "
                "there"
            )
        found: Any = anatomy.layers[layer]
        check_attention(found)
        return rotary(found.self_attn) if anatomy.adapter.turns(found.self_attn) else unturned

    def _attentions(self) -> list[nn.Module | None]:
        return [getattr(self.anatomy.layers[index], "self_attn", None) for index in (*self.previous, *self.next)]

    def follow(self) -> None:
        """Look at the layers again, which may have been exchanged since the last prefill.

        Raises:
            UnsupportedModelError: one that has no projections now.
        """
        present = self._attentions()
        changed = not all(map(is_, present, self._bound))
        for turns in (self.previous, self.next):
            for index in turns:
                if changed:
                    turns[index] = self._turn(index)
                check_attention(self.anatomy.layers[index])
        self._bound = present

    @property
    def layers_read(self) -> set[int]:
        """Layers whose input a stage reads once they run."""
        return {*self.previous, *self.earlier, *range(self.glimpses.until)}

    def spots(self) -> list[Spot]:
        """Where hooks belong, and which, in the layers that the model has now."""
        found: list[Spot] = []
        for index in self.previous:
            attention: Any = self.anatomy.layers[index].self_attn
            found.append((attention, partial(pre_hook, hook=self._entry_hook(index))))
            found.append((attention.q_proj, partial(post_hook, hook=self._query_hook(index))))
            found.append((attention.k_proj, partial(post_hook, hook=self._key_hook(index))))
        return found

    def _entry_hook(self, index: int) -> Callable[..., None]:
        def before_attention(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> None:
            source = self.threads.now.inputs.get(index)
            if source is not None and kwargs is not None:
                source.entered = args[0] if args else kwargs.get("hidden_states")

        return before_attention

    def _query_hook(self, index: int) -> Callable[..., None]:
        def after_queries(module: nn.Module, args: Any, output: Tensor) -> None:
            source = self.threads.now.inputs.get(index)
            if source is not None and source.projects(args):
                # A layer under gradient checkpointing runs again in the backward pass, when nobody listens: autograd
                # must not record anything here that it would miss there.
                source.queries = output if output.requires_grad else take(output, source.text, 1)
                source.all_queries = output.requires_grad
                if index in self.queries:
                    source.vision = output

        return after_queries

    def _key_hook(self, index: int) -> Callable[..., None]:
        def after_keys(module: nn.Module, args: Any, output: Tensor) -> None:
            source = self.threads.now.inputs.get(index)
            if source is not None and source.projects(args):
                source.keys = output

        return after_keys

    def layer_enters(self, call: LayerCall, *, elsewhere: bool = False) -> None:
        """A layer is about to run: remember what later stages need of it, and forget what none needs any more.

        Args:
            call: the layer, behind the stages at its place.
            elsewhere: it runs where its projections cannot be tapped (engine/packed), so its input is kept whole.
        """
        now, layers = self.threads.now, self.anatomy.layers
        now.inputs.clear()
        for index in [index for index in now.hidden if self.earlier[index] <= call.index]:
            del now.hidden[index]
        if call.index in self.previous:
            now.inputs[call.index] = _input(call, layers, self.previous, call.hidden if elsewhere else None)
        if call.index in self.earlier:
            tokens = call.prefill.prompt.tokens
            now.hidden[call.index] = _signal(ops.take_rows(call.hidden, tokens.slot), tokens)

    def attention(self, stage: Stage, call: LayerCall) -> Attention | None:
        """The attention that `stage` before that layer may ask for; None where its parts read none."""
        if not stage.reads.attention:
            return None
        sources = {"previous": self.threads.now.inputs.get(call.index - 1)}
        if "next" in stage.reads.attention:
            sources["next"] = _input(call, self.anatomy.layers, self.next, call.hidden)
        most = None if stage.raters is None else stage.raters.most
        return rater_attention(sources, call.prefill.prompt.tokens, most)

    def signals(self, stage: Stage, call: LayerCall) -> dict[str, Signal]:
        """What `stage` before that layer reads of the layers that have run, by the name of the signal."""
        now = self.threads.now
        found = {earlier_signal(back): now.hidden[call.index - back] for back in stage.reads.earlier}
        if stage.reads.projections:
            source, tokens = now.inputs[call.index - 1], call.prefill.prompt.tokens
            at = columns(tokens, source.tokens)
            at = tokens.slot if at is None else at
            if stage.reads.layer_keys:
                found["layer_keys"] = _signal(take(keys_of(source), at, 2).transpose(1, 2), tokens)
            if stage.reads.layer_queries:
                found["layer_queries"] = _signal(vision_queries(source, at), tokens)
        return found

    def question(self, stage: Stage, call: LayerCall) -> Question | None:
        """The question as `stage` before that layer reads it; None where it does not."""
        if not stage.reads.question:
            return None
        text, states, keys = call.prefill.text, None, None
        if stage.reads.question_states:
            states = take(call.hidden, text, 1)
        if stage.reads.layer_keys:
            source = self.threads.now.inputs[call.index - 1]
            keys = take(keys_of(source), source.text, 2).transpose(1, 2)
        return replace(call.prefill.prompt.tokens.question, slot=text, states=states, keys=keys)


def _signal(value: Tensor, tokens: Tokens) -> Signal:
    """What was recorded of `tokens`, ``[B, N, ...]``."""
    valid = tokens.valid_if_padded
    origin = tokens.origin if valid is None else tokens.origin.masked_fill(~valid, max(tokens.total))
    return Signal(value, valid, origin)


def _check_reads(stage: Stage, layer: int) -> None:
    """Raise `UnsupportedModelError` for what no hook can give `stage` before `layer`."""
    if "previous" in stage.reads.attention and layer == 0:
        raise UnsupportedModelError(
            f"{stage.name} ({stage.place}): its scorer reads the attention of the layer before, "
            "but nothing runs before layer 0; place it before a later layer, or use layer: next"
        )
    if stage.reads.projections and layer == 0:
        raise UnsupportedModelError(
            f"{stage.name} ({stage.place}): a part reads queries or keys of the layer before, "
            "but nothing runs before layer 0; place it before a later layer"
        )
    if stage.reads.glimpse and layer == 0:
        raise UnsupportedModelError(
            f"{stage.name} ({stage.place}): a part reads what a glimpse behind the prompt looks at, but nothing runs "
            "before layer 0; place it before a later layer"
        )
    for back in stage.reads.earlier:
        if back > layer:
            raise UnsupportedModelError(
                f"{stage.name} ({stage.place}): a part reads hidden states that entered a decoder layer {back} before "
                f"the place, but the place is before layer {layer}; place it before layer {back} or later"
            )


def _input(call: LayerCall, layers: Any, turns: dict[int, Turn], hidden: Tensor | None) -> LayerInput:
    """What enters the layer. Without `hidden`, the layer projects queries and keys itself, and hooks read them."""
    return LayerInput(
        layer=layers[call.index],
        turn=turns[call.index],
        hidden=hidden,
        rope=call.kwargs["position_embeddings"],
        mask=call.kwargs.get("attention_mask"),
        biased=call.forward.biased(call.store),
        store=call.store,
        stored=call.forward.stored(call.store),
        text=call.prefill.text,
        tokens=call.prefill.prompt.tokens,
    )
