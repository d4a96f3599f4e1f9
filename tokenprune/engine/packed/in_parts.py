"""Forwards whose layers the caller calls one by one: it tells the engine what the base model's call would have told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tokenprune.engine.engine import Engine
from tokenprune.engine.layer_call import LayerCall


def begin(engine: Engine, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Say what the base model would have been called with, ``[B, L]`` both: the caller calls the text model."""
    engine.begin_base(engine.anatomy.base, (), {"input_ids": input_ids, "attention_mask": attention_mask})


def begin_text_only(engine: Engine) -> None:
    """Say that the caller calls the text model, or some of its layers, with no vision token."""
    engine.now.close()
    engine.now.text_only = True


@contextmanager
def running(
    engine: Engine, input_ids: Tensor, attention_mask: Tensor, embeddings: Tensor, positions: Tensor, cache: Any
) -> Iterator[None]:
    """A prefill whose layers the caller calls one by one; the layers below may have run elsewhere.

    Args:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 0 on padding.
        embeddings: ``[B, L, D]`` that entered layer 0.
        positions: ``[B, L]`` position ids.
        cache: empty, for the layers that are called inside.
    """
    begin(engine, input_ids, attention_mask)
    call = {"inputs_embeds": embeddings, "position_ids": positions, "cache": cache}
    output = None
    try:
        engine.begin_text(engine.anatomy.text, (), call)
        yield
        output = embeddings
    finally:
        engine.end_text(engine.anatomy.text, (), output)


def layer_ran(engine: Engine, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Say that layer `index` ran elsewhere, entered by `hidden` ``[B, L, D]`` and called with `kwargs`."""
    forward, prefill = engine.now.forward, engine.prefill
    if forward is not None and prefill is not None:
        engine.taps.layer_enters(LayerCall(index, hidden, kwargs, None, forward, prefill), elsewhere=True)
