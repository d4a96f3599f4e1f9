"""Samplers that pick one token after another, each by what it adds to those before it (`tokenprune.core.greedy`)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, greedy, ops, transfer
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.work import Work

Power = Annotated[float, Field(ge=0, le=16)]
Temperature = Annotated[float, Field(gt=0, le=100)]
Features = Literal["hidden", "tower"]
"""Hidden states at the place, or those that the vision tower has given to the projector."""


class GreedySampler(Sampler):
    """Picks the token of highest gain, again and again; its subclasses differ in the gain alone."""

    def forward(self, tokens: Tokens, scores: Tensor, count: Count) -> Tensor:
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if not any(counts):
            return tokens.origin.new_empty(batch, 0)
        order = greedy.greedy(self.gain(tokens, scores.detach(), max(counts)), counts, tokens.valid_if_padded)
        return ops.places(ops.mask_of(order, n, padded=ops.ragged(counts)), counts)

    @abstractmethod
    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        """What each token adds, before anything is picked; at most `picks`, at least 1, will be."""

    def multiply_adds(self, work: Work) -> int | None:
        """All cosines."""
        return work.tokens**2 * work.width


class FeaturesSampler(GreedySampler):
    """Looks at how alike tokens are, here or in the vision tower."""

    features: Features

    @property
    def reads(self) -> Needs:
        return Needs(tower="hidden") if self.features == "tower" else Needs()

    def multiply_adds(self, work: Work) -> int:
        return work.tokens**2 * (work.tower_width if self.features == "tower" else work.width)


class MaxMinSampler(GreedySampler):
    """Tokens as far apart as can be: each is the one whose nearest token picked so far is farthest (DivPrune).

    Distance is 1 - cosine of hidden states; scores are not looked at. The first is the token whose nearest other is
    farthest, so one outlier always survives.
    """

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        alike = gram.cosines(features(tokens))
        return greedy.MaxMin(alike, tokens.valid_if_padded)


class MaxSumSampler(GreedySampler):
    """Tokens far from each other on the whole: each has the largest sum of distances to those picked so far (ToDRE).

    Distance is 1 - cosine of hidden states; scores are not looked at. The first has the largest sum to all tokens.
    Unlike max-min, it may pick tokens that are near each other, if they are far from the rest.
    """

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        return greedy.MaxSum(gram.cosines(features(tokens)), tokens.valid_if_padded)


class FacilityLocationSampler(FeaturesSampler):
    """Tokens that cover all others best: each adds most to how alike every token is to its nearest pick.

    Args:
        weight_on: scores weigh the ``covered`` token (EADP), the ``candidate`` that would cover (SCOPE), or ``none``.
        power: exponent of those weights, which are scores above 0 over the largest; higher listens more to scores.
        similarity: ``cosine``, below 0 not at all (SCOPE); ``shifted``, (1 + cosine) / 2 (EADP).
        features: tokens are alike by their ``hidden`` states at the place, or by what the ``tower`` has given to the
            projector (SCOPE).
    """

    def __init__(
        self,
        *,
        weight_on: Literal["none", "covered", "candidate"] = "none",
        power: Power = 1.0,
        similarity: Literal["cosine", "shifted"] = "cosine",
        features: Features = "hidden",
    ) -> None:
        super().__init__()
        self.weight_on = weight_on
        self.power = power
        self.similarity = similarity
        self.features = features
        self.check()

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        alike = gram.cosines(features(tokens, self.features))
        if self.similarity == "shifted":
            alike = (1 + alike) / 2
        weights = None if self.weight_on == "none" else relative(scores) ** self.power
        real = tokens.valid_if_padded
        covered = weights if self.weight_on == "covered" else None
        if real is not None:
            covered = real.float() if covered is None else covered * real
        candidate = weights if self.weight_on == "candidate" else None
        return greedy.Coverage(alike, covered, candidate)


class QuestionCoverageSampler(FeaturesSampler):
    """Tokens that cover the words of the question and the other tokens best (MMTok); scores are not looked at.

    Rows are softmax distributions over the vision tokens: of each text token, and of each vision token. The sum over
    the rows of the largest entry that was picked is maximised.

    Args:
        text_temperature: of the text tokens' rows; lower is sharper (τ_t).
        vision_temperature: of the vision tokens' rows (τ_v).
        vision_weight: weight of all vision rows against all text rows; 0 looks at the question alone (α).
        features: vision tokens' rows compare their ``hidden`` states at the place, or what the ``tower`` has given to
            the projector (MMTok); text tokens' rows are about hidden states either way.
    """

    def __init__(
        self,
        *,
        text_temperature: Temperature = 0.02,
        vision_temperature: Temperature = 0.2,
        vision_weight: Annotated[float, Field(ge=0, le=100)] = 0.5,
        features: Features = "hidden",
    ) -> None:
        super().__init__()
        self.text_temperature = text_temperature
        self.vision_temperature = vision_temperature
        self.vision_weight = vision_weight
        self.features = features
        self.check()

    @property
    def reads(self) -> Needs:
        return super().reads | Needs(question=True)

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        x, asked = features(tokens), tokens.question
        words = asked.embeddings.detach().masked_fill(~asked.valid.unsqueeze(-1), 0.0)
        text = self._rows(gram.cosines(words, x) / self.text_temperature, tokens, asked.valid)
        shown = features(tokens, self.features)
        vision = self._rows(gram.cosines(shown) / self.vision_temperature, tokens, tokens.valid)
        rows = torch.cat([text, self.vision_weight * vision], 1)
        return greedy.Coverage(rows)

    @staticmethod
    def _rows(logits: Tensor, tokens: Tokens, real: Tensor) -> Tensor:
        """Rows ``[B, M, N]`` of distributions over the vision tokens, over how many real ones a sample has."""
        if tokens.padded:
            logits = logits.masked_fill(~tokens.valid.unsqueeze(1), -torch.inf)
        number = real.sum(1).clamp(min=1).view(-1, 1, 1)
        return (logits.softmax(-1) / number).masked_fill(~real.unsqueeze(-1), 0.0)

    def multiply_adds(self, work: Work) -> int:
        return super().multiply_adds(work) + work.tokens * work.text * work.width


class DeterminantSampler(GreedySampler):
    """Tokens whose kernel has the largest determinant, picked greedily: relevant and unlike each other.

    Where the kernel has no rank left, tokens follow by their scores.

    Args:
        kernel: ``relevance``, r_i · cosine · r_j of scores r brought to 0 … 1 within the sample (CDPruner); or
            ``quadratic``, I + 0.01 · (X Xᵀ)² of features divided by their length over the tokens (OTPrune), which does
            not look at scores.
    """

    def __init__(self, *, kernel: Literal["relevance", "quadratic"] = "relevance") -> None:
        super().__init__()
        self.kernel = kernel
        self.check()

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        x = features(tokens)
        if self.kernel == "relevance":
            relevance = spread_out(scores) + 1e-6
            kernel = gram.cosines(x) * relevance.unsqueeze(1) * relevance.unsqueeze(2)
        else:
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            columns = torch.nn.functional.normalize(x.to(wide), dim=1)
            dots = columns @ columns.mT
            kernel = (0.01 * dots @ dots.mT).float()
            kernel.diagonal(dim1=1, dim2=2).add_(1.0)
        finite = scores.clamp(min=torch.finfo(scores.dtype).min)
        return greedy.Determinant(kernel, picks, finite)

    def multiply_adds(self, work: Work) -> int:
        """The kernel, and the growing factor of its picks."""
        kernel = work.tokens**2 * (work.width + work.tokens * (self.kernel == "quadratic"))
        return kernel + work.tokens * work.kept * (work.kept - 1) // 2


class SuppressSampler(FeaturesSampler):
    """The best scores, without tokens too much like one already picked, which come last (GreedyPrune's NMS).

    Args:
        threshold: cosine above which a token is too much like another; lower spreads more (τ).
        relative: the threshold is a factor on the mean cosine of different tokens, of the group where there are groups
            (PruneSID); a factor may be above 1.
        features: tokens are alike by their ``hidden`` states at the place, or by what the ``tower`` has given to the
            projector.
    """

    def __init__(
        self,
        *,
        threshold: Annotated[float, Field(ge=-1, le=100)] = 0.9,
        relative: bool = False,
        features: Features = "hidden",
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.relative = relative
        self.features = features
        self.check()
        if threshold > 1 and not relative:
            raise InputError(f"{self.title}: threshold={threshold}: no cosine is above 1; expected -1 … 1, or relative")

    def gain(self, tokens: Tokens, scores: Tensor, picks: int) -> greedy.Gain:
        alike = gram.cosines(features(tokens, self.features))
        if not self.relative:
            return greedy.Suppression(scores, alike, self.threshold)
        # Cosines with padding are 0.
        pairs = transfer.ints([max(1, size * (size - 1)) for size in tokens.sizes], alike.device)
        wide = greedy.WIDE[alike.device.type == "mps"]
        total = alike.sum((1, 2), dtype=wide) - alike.diagonal(dim1=1, dim2=2).sum(1, dtype=wide)
        return greedy.Suppression(scores, alike, (self.threshold * total / pairs).float().unsqueeze(1))


def features(tokens: Tokens, of: Features = "hidden") -> Tensor:
    """Hidden states ``[B, N, D]`` at the place or of the vision tower, 0 on padding; a choice has no derivative."""
    hidden = (tokens.signal("hidden") if of == "tower" else tokens.hidden).detach()
    return hidden.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else hidden


def relative(scores: Tensor) -> Tensor:
    """Scores above 0 over the largest of the sample, ``[B, N]`` in 0 … 1; 1 throughout where none is above 0."""
    above = scores.clamp(min=0)
    largest = above.amax(1, keepdim=True)
    return torch.where(largest > 0, above / largest.clamp(min=torch.finfo(above.dtype).tiny), 1.0)


def spread_out(scores: Tensor) -> Tensor:
    """Finite scores of the sample brought to 0 … 1, ``[B, N]``; 1 throughout where all are equal, 0 on -inf."""
    real = scores > -torch.inf
    lowest = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    width = scores.amax(1, keepdim=True) - lowest
    share = (scores - lowest) / width.clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.where(width > 0, share, 1.0).masked_fill(~real, 0.0)
