"""Scores from the attention that raters pay to vision tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tokenprune.core import ops
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.attending import attention_of
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work


class AttentionScorer(Scorer):
    """Attention that the raters pay to a vision token: weighted mean over raters, mean over heads.

    FastV (last text token, ``rope: true``), FEATHER (``rope: false``, ``normalise: vision``), SparseVLM equations 2
    and 3 (raters above the mean), PyramidDrop (``layer: next``).

    Args:
        rope: compare queries and keys with their rotary embedding, as the layer does; false takes the distance between
            rater and token out of the score, which else favours the bottom of the image in early layers (FEATHER).
        normalise: softmax over ``all`` keys, or over ``vision`` keys alone, so that heads which look at the image
            little have as much say as the others (FEATHER).
        layer: whose queries and keys: of the ``previous`` layer, which has run, or of the ``next`` one, which will be
            the first to see fewer tokens (PyramidDrop).
        heads: ``all``, or only so many heads, those that pay most to the image, sample by sample; higher listens to
            more heads (SparseVLM+ takes 14).
        gravity: divide by what rotary distance alone would give (SparseVLM+); the divisor is bounded from below by a
            tenth of its peak.
    """

    def __init__(
        self,
        *,
        rope: bool = True,
        normalise: Literal["all", "vision"] = "all",
        layer: Literal["previous", "next"] = "previous",
        heads: Literal["all"] | Annotated[int, Field(ge=1, le=1024)] = "all",
        gravity: bool = False,
    ) -> None:
        super().__init__()
        self.rope = rope
        self.normalise = normalise
        self.layer = layer
        self.heads = heads
        self.gravity = gravity
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(attention=self.layer)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        attention, raters = attention_of(self, tokens, raters)
        heads = attention.scores(
            raters, rope=self.rope, normalise=self.normalise, layer=self.layer, gravity=self.gravity
        )
        if heads.shape[::2] != tokens.valid.shape:
            raise InputError(
                f"scorer 'attention': the attention covers {heads.shape[2]} vision tokens of {heads.shape[0]} samples, "
                f"the stage has {tokens.valid.shape[1]} of {tokens.valid.shape[0]}; is it from before another stage?"
            )
        return tokens.only_valid(self._over_heads(heads.float()))

    def multiply_adds(self, work: Work) -> int:
        averaged = work.raters * (work.tokens if self.gravity else work.sequence) * work.heads
        return work.rater_rows(layer=self.layer, gravity=self.gravity) + averaged

    def _over_heads(self, scores: Tensor) -> Tensor:
        """``[B, H, N]`` to ``[B, N]``."""
        number = scores.shape[1]
        if self.heads == "all" or self.heads >= number:
            return scores.mean(1)
        best = ops.top_k(scores.sum(2), [self.heads] * scores.shape[0])
        return ops.take_rows(scores, best).mean(1)
