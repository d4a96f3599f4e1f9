"""Recycling into one summary of everything that was dropped."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.core.merge import Merge
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class SummaryRecycler(Learned, Recycler):
    """What was dropped becomes one token, in the slot of the last of it: ``softmax(w · norm(x))ᵀ x``.

    One token for all pictures of the prompt, and behind everything that it sums up, so that later text may read it.
    The layer w starts at 0, where all weights are equal: the mean, which is also what it is without weights. It is
    Skip-Vision's adaptive summary token.

    Args:
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both. Without, the mean.
    """

    plain: ClassVar[bool] = True

    def __init__(self, *, weights: Weights | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.check()

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.score = nn.Linear(host.width, 1, bias=False)  # a bias, as the paper has it, cancels in the softmax
        nn.init.zeros_(self.score.weight)

    def added(self, dropped: int) -> int:
        return min(dropped, 1)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        self.ready(tokens)
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes:
            return None
        anchors = tuple(self.added(size - k) for size, k in zip(tokens.sizes, counts, strict=True))
        gone = tokens.valid & ~ops.mask_of(kept, n, padded=ops.ragged(counts))
        share = gone.float().unsqueeze(1)
        weight = self._worth(tokens).masked_fill(~gone, torch.finfo(torch.float32).min).softmax(-1)
        source = torch.arange(n, device=kept.device).expand(batch, n)
        last = torch.where(gone, source, -1).amax(1, keepdim=True)  # -1 where nothing was dropped
        return Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=last,
            weight=weight.unsqueeze(1) * share,
            mean=False,
            anchors=anchors,
            source_counts=None if tokens.padded else tokens.sizes,
            share=share,
        )

    def _worth(self, tokens: Tokens) -> Tensor:
        """``[B, N]`` float32, by how much each counts."""
        if self.host is None:
            return torch.zeros(tokens.valid.shape, device=tokens.hidden.device)
        worth: Tensor = self.score(self.norm(tokens.hidden.float())).squeeze(-1)
        return worth

    def multiply_adds(self, work: Work) -> int:
        """Sums of states and masses of all tokens, where those kept have weight 0; with weights, a number for each."""
        return work.tokens * (work.width * (1 + (self.host is not None)) + 1)
