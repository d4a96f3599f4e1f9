"""A recycler's plan applied, as a stage does it, for tests of recyclers alone."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.recyclers.base import Recycler


def recycled(recycler: Recycler, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> tuple[Tokens, Tensor]:
    """The tokens that are left, and ``[B, A]`` indices into N of the anchors."""
    plan = recycler(tokens, kept, scores, count)
    return recycler.recycle(tokens, kept, scores, count), kept[:, :0] if plan is None else plan.anchor
