"""Scores from what the decoder layers have made of the tokens: how they moved, and whom they resemble."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core.greedy import WIDE
from tokenprune.core.needs import Needs, earlier_signal
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.attending import attention_of
from tokenprune.parts.limits import Share
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.work import Work, no_products


class ChangeScorer(Scorer):
    """How much the last layers have changed a token: what they leave as it is has given its share (V2Drop, section 3).

    Neither attention nor the question is looked at.

    Args:
        back: over so many layers; higher looks at a longer way.
        measure: the length of the difference (``l2``), or one minus the ``cosine`` of before and after.
    """

    multiply_adds = no_products

    def __init__(
        self, *, back: Annotated[int, Field(ge=1, le=256)] = 1, measure: Literal["l2", "cosine"] = "l2"
    ) -> None:
        super().__init__()
        self.back = back
        self.measure = measure
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(earlier=(self.back,))

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        before, now = tokens.signal(earlier_signal(self.back)).float(), tokens.hidden.float()
        if self.measure == "cosine":
            return tokens.only_valid(1 - torch.cosine_similarity(before, now, dim=-1))
        return tokens.only_valid((now - before).norm(dim=-1))


class AffinityScorer(Scorer):
    """How often a vision token is the one that others resemble most, by softmax over the vision tokens (STAR).

    Each asker spreads one vote over the vision tokens, softmax of the dot products of hidden states divided by the
    square root of their width; a token's score is the mean vote that it receives. STAR as printed takes the mean over
    the same axis as the softmax, which is the same for all; this is the mean over the askers.

    Args:
        by: the ``vision`` tokens ask (STAR's first stage), or the ``raters`` of the stage, by their hidden states at
            the place (its second).
    """

    def __init__(self, *, by: Literal["vision", "raters"] = "vision") -> None:
        super().__init__()
        self.by = by
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(raters=True, question_states=True) if self.by == "raters" else Needs()

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        valid, weights = tokens.valid_if_padded, raters
        askers: Tensor = tokens.hidden
        if self.by == "vision":
            weights = tokens.valid.float() / tokens.valid.sum(1, keepdim=True).clamp(min=1)
        else:
            if weights is None:
                raise InputError(f"{self.title} needs raters: give the stage one, for example 'all_text'")
            askers = tokens.question.states
        # Wide, so that equal tokens get equal votes wherever they stand, in any batch.
        wide = WIDE[tokens.hidden.device.type == "mps"]
        logits = askers.to(wide) @ tokens.hidden.to(wide).mT / tokens.hidden.shape[-1] ** 0.5
        if valid is not None:
            # The lowest number instead of -inf: with no vision token at all, softmax would be NaN.
            logits = torch.where(valid.unsqueeze(1), logits, torch.finfo(logits.dtype).min)
        votes = logits.softmax(-1)
        votes = torch.where((weights > 0).unsqueeze(-1), votes, 0.0)  # rows of padding may be NaN
        return tokens.only_valid((weights.unsqueeze(1).to(wide) @ votes).squeeze(1).float())

    def multiply_adds(self, work: Work) -> int:
        askers = work.tokens if self.by == "vision" else work.text
        return work.tokens * askers * (work.width + 1)


class GlobalQueryScorer(Scorer):
    """How well a token's key answers the mean query of all vision tokens, times the length of its hidden state (PACT).

    Queries and keys are those of the layer that has run; the answers are softmaxed over the vision tokens in each head,
    and averaged over heads. The question is not looked at.
    """

    reads = Needs(layer_keys=True, layer_queries=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        valid = tokens.valid[..., None, None]
        keys = tokens.signal("layer_keys").float().where(valid, 0.0)
        asked = tokens.signal("layer_queries").float().where(valid, 0.0).sum(1)
        asked = asked / tokens.valid.sum(1).clamp(min=1)[:, None, None]
        heads = asked.unflatten(1, (keys.shape[2], -1))  # [B, Hkv, queries a key head, d]
        logits = torch.einsum("bkrd,bnkd->bkrn", heads, keys) / keys.shape[-1] ** 0.5
        logits = torch.where(tokens.valid[:, None, None], logits, torch.finfo(logits.dtype).min)
        answered = logits.softmax(-1).mean((1, 2))
        return tokens.only_valid(answered * tokens.hidden.float().norm(dim=-1))

    def multiply_adds(self, work: Work) -> int:
        return work.tokens * work.heads * work.head_dim


class SpectralChangeScorer(Scorer):
    """How far a token has moved from high to low frequencies since the first layer, times its attention (CLSE).

    The spectrum is that of a token's hidden state along its numbers. What is compared is the share of its energy in the
    upper part of the spectrum, as it entered the language model and now. Tokens that have not moved down score 0.

    Args:
        high: share of the frequencies that count as high; higher takes in more of them.
        layer: whose attention: as in the scorer ``attention``.
    """

    def __init__(self, *, high: Share = 0.5, layer: Literal["previous", "next"] = "previous") -> None:
        super().__init__()
        self.high = high
        self.layer = layer
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(attention=self.layer, embedding=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        attention, raters = attention_of(self, tokens, raters)
        looked = attention.scores(raters, layer=self.layer).float().mean(1)
        moved = self._upper(tokens.signal("embedding")) - self._upper(tokens.hidden)
        return tokens.only_valid(moved.clamp(min=0) * looked)

    def multiply_adds(self, work: Work) -> int:
        """The attention, as in the scorer ``attention``; two fast transforms of each token, at log2 of the width."""
        transforms = 2 * work.tokens * work.width * max(1, work.width.bit_length() - 1)
        return work.rater_rows(layer=self.layer) + work.raters * work.sequence * work.heads + transforms

    def _upper(self, x: Tensor) -> Tensor:
        """Share of the energy ``[B, N]`` in the upper frequencies, the constant left out; 0 where there is none."""
        if not x.shape[1]:
            return x.new_zeros(x.shape[:2], dtype=torch.float32)
        energy = torch.fft.rfft(x.float(), dim=-1).abs().square()[..., 1:]
        upper = energy[..., energy.shape[-1] - max(1, int(self.high * energy.shape[-1])) :].sum(-1)
        return upper / energy.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
