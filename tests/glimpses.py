"""What a glimpse must look at: an untouched model, a longer prompt, and the attention that its eager kernel gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from families import CACHE, vision_mask
from torch import Tensor, nn
from torch.nn.functional import pad

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.engine.traces import post_hook, pre_hook
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work

PER_TOKEN = {"input_ids": 7, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Arguments that are longer by the appended position, and what stands there."""


class Looking(Scorer):
    """Scores of a glimpse, mean over heads; `seen` keeps what it looked at, ``[B, H, N]`` each."""

    reads = Needs(glimpse=True)

    def __init__(self, *, vectors: Any = None) -> None:
        super().__init__()
        self.vectors = vectors
        self.seen: list[Tensor] = []

    def forward(self, tokens: tp.Tokens, raters: Tensor | None = None) -> Tensor:
        assert tokens.glimpse is not None
        self.seen.append(tokens.glimpse(self.vectors))
        return tokens.only_valid(self.seen[-1].mean(1))

    def multiply_adds(self, work: Work) -> int:
        return 0


def vectors_of(model: Any, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Vectors ``[layers, D]`` large enough to matter: the first as large as what enters, the others as states are."""
    config = model.config.get_text_config()
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(config.num_hidden_layers, config.hidden_size, generator=draw)


@torch.no_grad()
def appended(model: Any, batch: Mapping[str, Any], vectors: Tensor, layer: int) -> Tensor:
    """Attention ``[H, N]`` over the vision tokens, of a position appended to the prompt of one sample, at `layer`.

    The untouched model makes positions and masks of the longer prompt itself; hooks set the state of the last position
    in front of layer 0, and add to it in front of the others.
    """
    longer = {
        name: pad(value, (0, 1), value=PER_TOKEN[name]) if name in PER_TOKEN else value for name, value in batch.items()
    }
    with entering(model, vectors, layer) as rows:
        model(**longer)
    return over_vision(rows[0], vision_mask(model, longer["input_ids"])[0])


@torch.no_grad()
def decoded(model: Any, batch: Mapping[str, Any], vectors: Tensor, layer: int) -> Tensor:
    """The same by a decode step, for a model whose prompt sees all of itself, and would see what is appended."""
    ids: list[Tensor] = []
    text = model.get_decoder()
    handle = pre_hook(text, lambda module, args, kwargs: ids.append(kwargs["position_ids"]))
    cache = model(**batch, use_cache=True)[CACHE]
    handle.remove()
    length = batch["input_ids"].shape[1]
    step = {
        "inputs_embeds": torch.zeros(1, 1, vectors.shape[1]),
        "attention_mask": torch.ones(1, length + 1, dtype=torch.int64),
        "position_ids": ids[0][:, -1:] + 1,
    }
    with entering(model, vectors, layer) as rows:
        text(**step, use_cache=True, **{CACHE: cache})
    return over_vision(rows[0][:, :length], vision_mask(model, batch["input_ids"])[0])


@contextmanager
def entering(model: Any, vectors: Tensor, layer: int) -> Iterator[list[Tensor]]:
    """Set the state of the last position in front of layer 0 and add to it in front of the others, up to `layer`; what
    it looks at there, ``[H, K]``, comes into the list."""
    layers: list[nn.Module] = list(model.get_decoder().layers)
    found: list[Tensor] = []

    def enters(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0].clone()
            hidden[:, -1] = vectors[0] if index == 0 else hidden[:, -1] + vectors[index]
            return (hidden, *args[1:]), kwargs

        return hook

    handles = [pre_hook(module, enters(index)) for index, module in enumerate(layers[: layer + 1])]
    attention: Any = layers[layer].self_attn
    handles.append(post_hook(attention, lambda module, args, output: found.append(output[1][0, :, -1])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def over_vision(row: Tensor, vision: Tensor) -> Tensor:
    """``[H, N]``: attention ``[H, L]`` over the vision tokens alone."""
    row = row[:, vision]
    return row / row.sum(-1, keepdim=True)
