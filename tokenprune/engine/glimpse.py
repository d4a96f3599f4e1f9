"""Glimpses: one position behind the prompt that runs through the layers below a stage, when a part of it asks.

The prompt is causal and does not see it, so it need not stand in the sequence: positions, masks and caches stay those
of the prompt. It runs as a decode step would, on the keys and values that each layer has made, and nothing is stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from tokenprune.core.attention import Projection, RaterAttention
from tokenprune.core.precision import autocast_of_now
from tokenprune.core.tokens import Glimpse
from tokenprune.engine.cache import cache_in
from tokenprune.engine.layer_call import LayerCall
from tokenprune.engine.parallel import gather_of
from tokenprune.engine.passed import Listener, Passed
from tokenprune.engine.projections import Rope, columns, keys_of, queries_behind
from tokenprune.engine.state import Threads
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import Anatomy
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


class Glimpses:
    """What a position behind the prompt looks at, for the stages of `pipeline` that ask for it.

    Args:
        anatomy: the model's modules.
        pipeline: its stages say what they read.
        threads: whose forwards they belong to.

    Raises:
        UnsupportedModelError: a layer below such a stage that a further position cannot be run through by itself.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline, threads: Threads) -> None:
        self.anatomy = anatomy
        self.threads = threads
        self.until = 0
        """How many layers, from the first on, are kept for it."""
        for stage, layer in zip(pipeline, pipeline.layers(len(anatomy.layers)), strict=True):
            if stage.reads.glimpse:
                _check(anatomy, stage, layer)
                self.until = max(self.until, layer)

    def layer_enters(self, call: LayerCall) -> dict[str, Any]:
        """A layer is about to run: keep what a glimpse needs of it. What to call it with."""
        now, index = self.threads.now, call.index
        if index == 0 or index >= self.until:
            now.passed = []
        if index >= self.until:
            return call.kwargs
        listener = Listener() if cache_in(call.kwargs) is None else None
        name, layer = self.anatomy.cache_name, self.anatomy.layers[index]
        now.passed.append(Passed.of(layer, call, name, listener, self._window(index)))
        return call.kwargs if listener is None else {**call.kwargs, name: listener}

    def at(self, stage: Stage, call: LayerCall) -> Glimpse | None:
        """What `stage` before that layer may ask; None where its parts do not. Nothing runs until one does."""
        if not stage.reads.glimpse:
            return None
        now = self.threads.now
        passed, source, tokens = tuple(now.passed), now.inputs.get(call.index - 1), call.prefill.prompt.tokens
        as_the_layer = autocast_of_now(call.hidden.device)  # a stage turns it off

        def look(vectors: Tensor) -> Tensor:
            if len(passed) != call.index or source is None:
                raise UnsupportedModelError(
                    f"{stage.name} ({stage.place}): a glimpse behind the prompt runs through all layers before the "
                    "place, and not all of them ran here as parts of one forward; ask by generate"
                )
            if vectors.dim() != 2 or vectors.shape[0] < len(passed) or vectors.shape[1] != call.hidden.shape[-1]:
                raise InputError(
                    f"{stage.name} ({stage.place}): vectors of a glimpse must be [{len(passed)} or more, "
                    f"{call.hidden.shape[-1]}], one for each layer before the place, got {tuple(vectors.shape)}"
                )
            with as_the_layer(), _unrecorded():
                hidden, rope = self._behind(passed, vectors, call.hidden)
                queries = queries_behind(source, hidden, rope)
                keys = keys_of(source).detach()
            attention: Any = source.layer.self_attn
            projection = Projection(
                q=queries,
                k=keys,
                visible=passed[-1].shown(biased=source.biased),
                sees_itself=True,
                scaling=float(attention.scaling),
                softcap=getattr(attention, "attn_logit_softcapping", None),
                columns=columns(tokens, source.tokens),
            )
            together = gather_of(source.layer, queries.shape[1])
            paid = RaterAttention(
                project=lambda layer, rope, rows: projection,
                gather=None if together is None else lambda layer, x: together(x),
                columns=tokens.slot,
                columns_valid=tokens.valid_if_padded,
            )
            return paid.scores(torch.ones_like(passed[-1].last), normalise="vision")

        return look

    def _behind(self, passed: Sequence[Passed], vectors: Tensor, like: Tensor) -> tuple[Tensor, Rope]:
        """Hidden state ``[B, 1, D]`` of the position behind the prompt that enters the last of these layers, and its
        rotary embedding there."""
        ropes: dict[tuple[int, str | None], tuple[Rope, Tensor]] = {}  # most layers share theirs
        hidden = vectors[0].to(like).expand(like.shape[0], 1, -1)
        for number, layer in enumerate(passed):
            of = id(layer.shift), self._kind(number)
            if of not in ropes:
                ids = _next_ids(layer)
                told = {} if of[1] is None else {"layer_type": of[1]}
                ropes[of] = self.anatomy.text.rotary_emb(hidden, ids, **told), ids
            if number:
                hidden = hidden + vectors[number].to(hidden)
            if layer is passed[-1]:
                break
            hidden = layer.run(hidden, *ropes[of])
        return hidden, ropes[of][0]

    def _kind(self, layer: int) -> str | None:
        """The type of a layer, where rotary embeddings differ by it."""
        return self.anatomy.text.config.layer_types[layer] if self.anatomy.rotary_by_type else None

    def _window(self, layer: int) -> int | None:
        """Keys that a query of the layer can see; None: all."""
        config = self.anatomy.text.config
        types = getattr(config, "layer_types", None)
        slides = self.anatomy.windowed if not types else types[layer] == "sliding_attention"
        return int(config.sliding_window) if slides else None


def _check(anatomy: Anatomy, stage: Stage, layer: int) -> None:
    """Raise `UnsupportedModelError` unless a further position can run through the layers below."""
    recurrent = sorted(index for index in anatomy.recurrent if index < layer)
    rotary = inspect.signature(anatomy.text.rotary_emb.forward).parameters
    why = None
    if recurrent:
        why = f"layer {recurrent[0]} is recurrent, whose state a further position would have to go through"
    elif anatomy.adapter.per_token:
        why = f"layers take {' and '.join(anatomy.adapter.per_token)} of each token, which no vectors stand for"
    elif anatomy.rotary_by_type and "layer_type" not in rotary:
        why = "its layers have rotary embeddings in several modules"
    if why is not None:
        raise UnsupportedModelError(
            f"{stage.name} ({stage.place}): a glimpse behind the prompt is not supported for {anatomy.adapter.title}: "
            f"{why}; use a scorer that reads the attention of raters"
        )


def _next_ids(layer: Passed) -> Tensor:
    """Position ids ``[B, 1]`` or ``[3, B, 1]`` that come next behind the prompt, at that layer."""
    forward, prompt = layer.call.forward, layer.call.prefill.prompt
    positions, last = forward.positions, prompt.last
    assert last is not None
    counted = torch.arange(forward.length, device=last.device) <= last
    if prompt.real is not None:
        counted = counted & prompt.real
    high = positions if positions.dim() == 2 else positions.amax(0)
    high = high.expand(forward.batch, -1).masked_fill(~counted, -1)
    ids = high.amax(1, keepdim=True) + 1
    if layer.shift is not None:
        ids = ids - layer.shift.to(ids.device)[:, None]
    return ids if positions.dim() == 2 else ids.expand(3, -1, -1)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Nothing that runs within the block is among the attentions and states that transformers returns."""
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)
