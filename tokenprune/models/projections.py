"""Queries of the text tokens and keys of all tokens, from a decoder layer's own projections."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.attention import Projection, RaterAttention
from tokenprune.errors import UnsupportedModelError
from tokenprune.models.gather import take, take_rope
from tokenprune.models.masks import rater_rows
from tokenprune.tokens import Tokens

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What enters a decoder layer in a prefill, after any pruning there: all that its attention depends on."""

    layer: nn.Module
    hidden: Tensor
    """``[B, L, D]``."""
    rope: Rope
    """cos and sin, ``[B, L, d]``."""
    mask: Tensor | None
    stored: int
    """Tokens of earlier forwards that this layer's cache holds."""
    text: Tensor
    """``[B, T]`` index in this sequence of the text tokens that may rate."""
    columns: Tensor
    """``[B, N0]`` index in this sequence of each original vision token; 0 for those that are gone."""


def rotary(attention: nn.Module) -> Callable[[Tensor, Rope], Tensor]:
    """The family's own rotary embedding of one tensor ``[B, H, L, d]`` (it knows about half-RoPE and interleaving)."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if next(iter(inspect.signature(apply).parameters)) == "q":
        return lambda x, rope: apply(x, x, *rope)[0]
    return lambda x, rope: apply(x, *rope, unsqueeze_dim=1)


def check_attention(layer: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless the layer has the projections that rater attention is computed from."""
    attention = getattr(layer, "self_attn", None)
    missing = [n for n in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, n)]
    if not hasattr(layer, "input_layernorm"):
        missing.append("input_layernorm")
    if missing:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {', '.join(missing)}: rater attention cannot be computed"
        )


def project(source: LayerInput, *, rope: bool) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, T, d]`` of the text tokens that may rate, and keys ``[B, Hkv, L, d]`` of all tokens.

    Bias and q/k norms are the layer's own; with `rope` off, both stay as they are before the rotary embedding.
    """
    attention: Any = source.layer.self_attn
    normed = source.layer.input_layernorm(source.hidden)  # type: ignore[operator]
    q = _heads(attention, "q", take(normed, source.text, 1))
    k = _heads(attention, "k", normed)
    if rope:
        turn = rotary(attention)
        q = turn(q, (take_rope(source.rope[0], source.text), take_rope(source.rope[1], source.text)))
        k = turn(k, source.rope)
    return q, k


def positional_kernel(source: LayerInput) -> tuple[Tensor, Tensor]:
    """`project` for all-ones queries and keys: what rotary distance alone contributes (SparseVLM+ gravity)."""
    attention: Any = source.layer.self_attn
    turn = rotary(attention)
    batch, length = source.hidden.shape[:2]
    ones = torch.ones(batch, 1, length, attention.head_dim, dtype=torch.float32, device=source.hidden.device)
    rope = (source.rope[0].float(), source.rope[1].float())
    k = turn(ones, rope)
    return take(k, source.text, 2), k


def rater_attention(sources: Mapping[str, LayerInput | None], tokens: Tokens) -> RaterAttention:
    """Attention of a prompt's raters over `tokens`, exact beside any kernel.

    Args:
        sources: what entered the layer ``"previous"`` to the place and, before the stage, the ``"next"`` one. Where an
            earlier stage of the same place has dropped tokens, the previous layer has still seen them.
        tokens: vision tokens that entered the stage.
    """
    origin = tokens.origin.clamp(min=0)

    def source(layer: str) -> LayerInput:
        found = sources[layer]
        assert found is not None, f"input of the {layer} layer was not remembered"
        return found

    def rows(layer: str, rope: bool) -> Projection:
        at = source(layer)
        q, k = project(at, rope=rope)
        attention: Any = at.layer.self_attn
        return Projection(
            q=q,
            k=k,
            visible=rater_rows(at.mask, at.text, at.stored, k.shape[2]),
            scaling=float(attention.scaling),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            columns=at.columns.gather(1, origin),
        )

    return RaterAttention(
        project=rows,
        columns=tokens.slot,
        columns_valid=tokens.valid,
        kernel=lambda layer: positional_kernel(source(layer)),
    )


def _heads(attention: Any, which: str, x: Tensor) -> Tensor:
    projected = getattr(attention, f"{which}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:
        projected = norm(projected)
    return projected.transpose(1, 2)
