"""Scorers: one float32 per vision token; higher survives."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import ops
from tokenprune.errors import InputError
from tokenprune.parts.density import prominence
from tokenprune.parts.limits import Seed
from tokenprune.parts.part import Part
from tokenprune.parts.work import Work
from tokenprune.tokens import Tokens


class Scorer(Part):
    """Scores the vision tokens. Base class of the role ``scorer``."""

    role = "scorer"
    suffix = "Scorer"
    needs_raters: ClassVar[bool] = False
    """Whether `forward` needs rater weights."""

    @property
    def needs_attention(self) -> str | None:
        """The layer whose attention it reads: ``"previous"``, ``"next"``, or None when it reads none."""
        return None

    @abstractmethod
    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        """Scores ``[B, N]`` float32, -inf on padding."""


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

    needs_raters = True

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
    def needs_attention(self) -> str | None:
        return self.layer

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        if tokens.attention is None:
            raise InputError(
                "scorer 'attention' needs the attention of a language model: there is none at this place. Give "
                "Tokens(attention=...), see tokenprune.attention, or prune before a layer instead of after vision"
            )
        if raters is None:
            raise InputError("scorer 'attention' needs raters: give the stage one, for example 'last_text'")
        heads = tokens.attention.scores(
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


class RandomScorer(Scorer):
    """Scores that look random: a hash of the seed and the token's original index.

    The same for every sample, batch, beam and run; PyTorch's random state is neither read nor changed.

    Args:
        seed: another number, another choice.
    """

    def __init__(self, *, seed: Seed = 0) -> None:
        super().__init__()
        self.seed = seed
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(ops.hashed(tokens.origin, self.seed))


class ConstantScorer(Scorer):
    """The same score for all: for samplers that do not look at scores. With top_k the first tokens survive."""

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(torch.zeros_like(tokens.mass, dtype=torch.float32))


class NormScorer(Scorer):
    """Euclidean length of a token's hidden state.

    Args:
        order: ``high`` keeps the longest, ``low`` the shortest.
    """

    def __init__(self, *, order: Literal["high", "low"] = "high") -> None:
        super().__init__()
        self.order = order
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        length = tokens.hidden.float().norm(dim=-1)
        return tokens.only_valid(length if self.order == "high" else -length)


class DensityPeaksScorer(Scorer):
    """Tokens that stand for many alike: dense, and far from any denser one (FEATHER's φ_KNN).

    Looks at the vision tokens as they entered the language model, whichever layer it is asked before, and not at the
    question. FEATHER reads the vision tower, one projection earlier, and adds noise against ties; of equals the first
    is the denser one here. Compares all pairs of tokens, in time and in memory.

    Args:
        neighbours: nearest tokens that density counts, the token itself among them; higher smooths it.
    """

    def __init__(self, *, neighbours: Annotated[int, Field(ge=1, le=1024)] = 5) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.check()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        features = tokens.hidden
        if "vision_embedding" in tokens.aux:  # later in the model, hidden states are no features any more
            features = ops.take_rows(tokens.aux["vision_embedding"], tokens.origin.clamp(min=0))
        counted = [min(self.neighbours, size) for size in tokens.sizes]
        apart = ops.distances(features.float()) / features.shape[-1] ** 0.5
        return tokens.only_valid(prominence(apart, tokens.valid_if_padded, counted))

    def multiply_adds(self, work: Work) -> int:
        return work.tokens**2 * work.width


class RasterScorer(Scorer):
    """Later tokens are worth more, so the bottom of the image survives: the position bias that FEATHER found, pure."""

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return tokens.only_valid(tokens.origin.float())
