"""Queries of the raters and keys of all tokens: a decoder layer's own, or from its own projections before it runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.core.attention import Projection, RaterAttention
from tokenprune.core.precision import autocast_of_now
from tokenprune.core.tokens import Tokens
from tokenprune.engine.cache import written_keys
from tokenprune.engine.cache_layers import CacheLayer
from tokenprune.engine.gather import take, take_rope
from tokenprune.engine.masks import Mask, rater_rows
from tokenprune.engine.parallel import gather_of, mesh_of
from tokenprune.errors import InputError, UnsupportedModelError

Rope = tuple[Tensor, Tensor]
Turn = Callable[[Tensor, Rope], Tensor]
"""A rotary embedding of one tensor ``[B, H, L, d]``."""


@dataclass(eq=False)
class LayerInput:
    """What enters a decoder layer in a prefill, after any pruning there: all that its attention depends on."""

    layer: nn.Module
    turn: Turn
    """`rotary` of the layer's attention."""
    hidden: Tensor | None
    """``[B, L, D]``; None where the layer is about to run, so that its projections need not be computed here."""
    rope: Rope
    """cos and sin, ``[B, L, d]``."""
    mask: Mask | None
    store: CacheLayer | None
    """The layer's cache."""
    stored: int
    """Tokens of earlier forwards that it holds."""
    text: Tensor
    """``[B, T]`` index in this sequence of the text tokens that may rate."""
    tokens: Tokens
    """The vision tokens in this sequence."""
    entered: Tensor | None = None
    """``[B, L, D]`` that entered the layer's attention: the very tensor that the layer itself projects."""
    queries: Tensor | None = None
    """``[B, T, H·d]``, of the text tokens that may rate, as the layer has projected them; of all tokens, ``[B, L,
    H·d]``, where `all_queries` is set."""
    all_queries: bool = False
    keys: Tensor | None = None
    """``[B, L, Hkv·d]``, as the layer has projected them."""
    vision: Tensor | None = None
    """``[B, L, H·d]`` queries of all tokens as projected, where those of vision tokens are read."""
    biased: bool = False
    """Whether the mask holds biases of keys."""

    @property
    def length(self) -> int:
        """L."""
        return self.rope[0].shape[-2]

    def projects(self, args: Sequence[Any]) -> bool:
        """Whether a projection called with `args` runs for the layer itself, which has not stated its input.

        Other hooks project rows of their own through the same modules (KV-cache compressors do). A call with the tensor
        that the attention was given has the layer's result, whoever made it.
        """
        return self.hidden is None and bool(args) and args[0] is self.entered


def rotary(attention: nn.Module) -> Turn:
    """The family's own rotary embedding (it knows about half-RoPE and interleaving).

    Raises:
        UnsupportedModelError: none stands beside the class of the attention.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(
            f"{type(attention).__module__} has no apply_rotary_pos_emb, the rotary embedding of "
            f"{type(attention).__name__}: rater attention cannot be computed"
        )
    if next(iter(inspect.signature(apply).parameters)) == "q":
        return lambda x, rope: apply(x, x[:, :0], *rope)[0]  # there are no keys to turn
    return lambda x, rope: apply(x, *rope, unsqueeze_dim=1)


def unturned(x: Tensor, rope: Rope) -> Tensor:
    """The rotary embedding of a layer that has none."""
    return x


def check_attention(layer: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless the layer has the projections that rater attention is computed from."""
    attention = getattr(layer, "self_attn", None)
    missing = [n for n in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, n)]
    if _norm_before(layer) is None:
        missing.append("input_layernorm")
    if missing:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {', '.join(missing)}: rater attention cannot be computed"
        )


def _norm_before(layer: nn.Module) -> Any:
    """The norm that a layer's attention reads through; None where no norm has its name."""
    names = ("input_layernorm", "operator_norm")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def project(source: LayerInput, *, rope: bool, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, R, d]`` of text tokens that may rate, and keys ``[B, Hkv, L, d]`` of all tokens.

    Bias and q/k norms are the layer's own; with `rope` off, both stay as they are before the rotary embedding.

    Args:
        source: the layer. If it has run, what it projected is used, and nothing is projected twice; nor are keys turned
            twice that stand in its cache.
        rope: with rotary embedding.
        rows: ``[B, R]`` which of the text tokens; None is all of them.

    Raises:
        UnsupportedModelError: the layer has run, but not through its q_proj and k_proj.
    """
    attention: Any = source.layer.self_attn
    text = source.text if rows is None else source.text.gather(1, rows)
    if source.hidden is not None:
        norm: Any = _norm_before(source.layer)
        queries = attention.q_proj(norm(take(source.hidden, text, 1)))
    elif source.queries is None:
        raise _not_tapped(source)
    else:
        queries = source.queries
        if source.all_queries:
            queries = take(queries, text, 1)
        elif rows is not None:
            queries = take(queries, rows, 1)
    q = _heads(attention, "q", queries)
    if rope:
        q = source.turn(q, (take_rope(source.rope[0], text), take_rope(source.rope[1], text)))
    return q, keys_of(source, rope=rope)


def keys_of(source: LayerInput, *, rope: bool = True) -> Tensor:
    """Keys ``[B, Hkv, L, d]`` of all tokens, as in `project`."""
    attention: Any = source.layer.self_attn
    if source.hidden is not None:
        norm: Any = _norm_before(source.layer)
        keys = attention.k_proj(norm(source.hidden))
    elif source.keys is None:
        raise _not_tapped(source)
    else:
        keys = source.keys
    k = _heads(attention, "k", keys)
    if not rope:
        return k
    written = None if source.keys is None else written_keys(source.store, source.stored, source.length)
    return source.turn(k, source.rope) if written is None or written.device != k.device else written


def vision_queries(source: LayerInput, at: Tensor) -> Tensor:
    """Queries ``[B, N, H, d]`` of the tokens at the slots `at` ``[B, N]``, after the rotary embedding."""
    attention: Any = source.layer.self_attn
    if source.hidden is not None:
        norm: Any = _norm_before(source.layer)
        queries = attention.q_proj(norm(take(source.hidden, at, 1)))
    elif source.vision is None:
        raise _not_tapped(source)
    else:
        queries = take(source.vision, at, 1)
    rope = take_rope(source.rope[0], at), take_rope(source.rope[1], at)
    return source.turn(_heads(attention, "q", queries), rope).transpose(1, 2)


def queries_behind(source: LayerInput, hidden: Tensor, rope: Rope) -> Tensor:
    """Queries ``[B, H, 1, d]`` of a position behind the prompt, whose state `hidden` ``[B, 1, D]`` enters the layer."""
    attention: Any = source.layer.self_attn
    norm: Any = _norm_before(source.layer)
    return source.turn(_heads(attention, "q", attention.q_proj(norm(hidden))), rope)


def _not_tapped(source: LayerInput) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(source.layer).__name__} ran without calling its q_proj and k_proj on what entered its attention (a "
        "fused kernel? a later hook that changes it?): the attention of raters cannot be read"
    )


def positional_kernel(source: LayerInput) -> tuple[Tensor, Tensor]:
    """`project` for all-ones queries and keys: what rotary distance alone contributes (SparseVLM+ gravity)."""
    attention: Any = source.layer.self_attn
    batch = source.text.shape[0]
    ones = torch.ones(batch, 1, source.length, attention.head_dim, dtype=torch.float32, device=source.rope[0].device)
    rope = (source.rope[0].float(), source.rope[1].float())
    k = source.turn(ones, rope)
    return take(k, source.text, 2), k


def rater_attention(sources: Mapping[str, LayerInput | None], tokens: Tokens, most: int | None) -> RaterAttention:
    """Attention of a prompt's raters over `tokens`, exact beside any kernel.

    Args:
        sources: what entered the layer ``"previous"`` to the place and, before the stage, the ``"next"`` one. Where an
            earlier stage of the same place has dropped tokens, the previous layer has still seen them.
        tokens: vision tokens that entered the stage.
        most: as in `RaterAttention`.
    """

    as_the_layer = autocast_of_now(tokens.slot.device)  # a stage turns it off
    heads: dict[str, int] = {}  # of a layer, that this process has

    def source(layer: str) -> LayerInput:
        found = sources.get(layer)
        if found is None:
            raise InputError(
                f"a part reads the attention of the {layer} layer, which no part of the stage has declared; "
                f'state it in `reads = Needs(attention="{layer}")`'
            )
        return found

    def projection(layer: str, rope: bool, rows: Tensor | None) -> Projection:
        at = source(layer)
        with as_the_layer():
            q, k = project(at, rope=rope, rows=rows)
        heads[layer] = q.shape[1]
        attention: Any = at.layer.self_attn
        text = at.text if rows is None else at.text.gather(1, rows)
        return Projection(
            q=q,
            k=k,
            visible=rater_rows(at.mask, text, at.stored, at.length, biased=at.biased),
            sees_itself=True,  # what rates is no padding, and causal
            scaling=float(attention.scaling),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            columns=columns(tokens, at.tokens),
        )

    def gather(layer: str, x: Tensor) -> Tensor:
        together = gather_of(source(layer).layer, heads[layer])
        return x if together is None else together(x)

    shared = any(at is not None and mesh_of(at.layer) is not None for at in sources.values())
    return RaterAttention(
        project=projection,
        gather=gather if shared else None,
        columns=tokens.slot,
        columns_valid=tokens.valid_if_padded,
        kernel=lambda layer: positional_kernel(source(layer)),
        most=most,
    )


def columns(tokens: Tokens, within: Tokens) -> Tensor | None:
    """``[B, N]`` slots of `tokens` in the sequence of `within`; None where that is their own."""
    if tokens.slot is within.slot:
        return None
    slots = tokens.slot.new_zeros(len(tokens.total), max(tokens.total))
    slots = ops.put_(slots, within.origin, within.slot, within.valid_if_padded)
    return slots.gather(1, tokens.origin.clamp(min=0))


def _query_heads(attention: Any) -> int:
    """Heads of the queries; 0 where the layer does not tell."""
    keys = getattr(attention.k_proj, "out_features", 0) // attention.head_dim
    return int(keys * getattr(attention, "num_key_value_groups", 0))


def _heads(attention: Any, which: str, projected: Tensor) -> Tensor:
    """``[B, n, H·d]`` to ``[B, H, n, d]``, normed where the family does; gates that a layer projects beside its queries
    are left out."""
    heads = projected.view(*projected.shape[:-1], -1, attention.head_dim)
    if which == "q" and heads.shape[-2] == 2 * _query_heads(attention):
        heads = heads[..., ::2, :]  # each head's gate stands behind its query
    names = (f"{which}_norm", f"{which}_layernorm")
    norm = next((getattr(attention, name) for name in names if hasattr(attention, name)), None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)
