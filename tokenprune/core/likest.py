"""`Likest`: how like each token is to the likest member of a set, while the set only changes and shrinks."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.core import ops

NEAR = 32
"""Likest tokens that each remembers."""


class Likest:
    """Similarity of tokens to the likest member of a set, of which each round brings another.

    On a CPU every token remembers the `NEAR` tokens that are most like it, so that a round looks these up and goes over
    all members only for tokens that have lost them all; elsewhere all are gone over, since a choice would have to be
    waited for. Both give the same numbers.

    Args:
        similarity: ``[B, N, N]``.
    """

    def __init__(self, similarity: Tensor) -> None:
        self._similarity = similarity
        self._sparse = similarity.device.type == "cpu" and not torch.compiler.is_compiling()
        self._remembered = 0
        """Tokens that could still be members when those that are near were looked for."""

    def __call__(self, tokens: Tensor, members: Tensor, stays: Tensor) -> Tensor:
        """``[B, T]`` similarity of each token to the likest member; -2 where there is none.

        Args:
            tokens: ``[B, T]`` indices; -1 on padding, whose result means nothing.
            members: ``[B, N]`` bool.
            stays: ``[B, N]`` bool, tokens that may be members in this round or a later one.
        """
        at = tokens.clamp(min=0)
        if not self._sparse:
            return ops.take_rows(self._similarity, at).masked_fill(~members.unsqueeze(1), -2.0).amax(2)
        left = int(stays.sum())
        if not self._remembered or 2 * left < self._remembered:
            self._remember(stays)
            self._remembered = left
        near = ops.take_rows(self._near, at)
        there = members.gather(1, near.flatten(1)).view_as(near)
        like = ops.take_rows(self._alike, at).masked_fill(~there, -2.0).amax(2)
        lost = ((like == -2.0) & (tokens >= 0) & members.any(1, keepdim=True)).nonzero()
        if len(lost):
            row, place = lost.unbind(1)
            rows = self._similarity[row, at[row, place]].masked_fill(~members[row], -2.0)
            like[row, place] = rows.amax(1)
        return like

    def _remember(self, stays: Tensor) -> None:
        """Look for the tokens that are most like each, among those that may still be members."""
        among = self._similarity.masked_fill(~stays.unsqueeze(1), -2.0)
        self._alike, self._near = among.topk(min(NEAR, among.shape[2]), dim=2)
