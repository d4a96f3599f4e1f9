"""Recycling by learned attention from the survivors to all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.core import ops
from tokenprune.core.merge import Merge, only
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.learned import Host, Learned, Weights
from tokenprune.parts.limits import Width
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.work import Work


class AbstractionRecycler(Learned, Recycler):
    """Survivors are queries: each takes in what it, and the question, find among all tokens, kept and dropped alike.

    ``state = x + E gelu(attention · V norm(all))``, with queries ``Q norm(x) + T mean(question)``. The attention is the
    plan: masses flow as it says. E starts at 0, so that training starts exactly at `drop`. It is BUS's patch
    abstraction decoder of one layer and one head, queried by the key patches.

    Args:
        dim: width of queries, keys and values; higher carries more and costs more.
        question: whether the question is read; without it a picture is abstracted alike for all, as a control.
        weights: file beside the recipe, with its digest; `tokenprune fit` writes both.
    """

    def __init__(self, *, dim: Width = 64, question: bool = True, weights: Weights | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.question = question
        self.weights = weights
        self.check()

    @property
    def reads(self) -> Needs:
        return Needs(question=self.question)

    def make(self, host: Host) -> None:
        self.norm = nn.LayerNorm(host.width)
        self.query = nn.Linear(host.width, self.dim, bias=False)
        self.key = nn.Linear(host.width, self.dim, bias=False)
        self.value = nn.Linear(host.width, self.dim)
        self.expand = nn.Linear(self.dim, host.width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        if self.question:
            self.text_norm = nn.LayerNorm(host.width)
            self.text = nn.Linear(host.width, self.dim, bias=False)

    def added(self, dropped: int) -> int:
        return 0

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        self.ready(tokens)
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes or not any(counts):
            return None
        seen = self._seen(tokens)
        query = self.query(ops.take_rows(seen, kept.clamp(min=0)))
        if self.question:
            query = query + self.text(self.text_norm(tokens.question.mean())).unsqueeze(1)
        alike = query @ self.key(seen).mT / self.dim**0.5
        if tokens.padded:
            alike = alike.masked_fill(~tokens.valid.unsqueeze(1), torch.finfo(alike.dtype).min)
        weight = alike.softmax(-1) * (kept >= 0).unsqueeze(-1) * tokens.valid.unsqueeze(1)
        source = torch.arange(n, device=kept.device).expand(batch, n)
        plan = Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=kept,
            weight=weight,
            mean=False,
            anchors=(0,) * batch,
            source_counts=None if tokens.padded else tokens.sizes,
            share=weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny),
        )
        return only(plan, [k < size for k, size in zip(counts, tokens.sizes, strict=True)])

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        found = plan.weight @ self.value(self._seen(tokens))
        own = ops.take_rows(tokens.hidden, plan.target.clamp(min=0)).float()
        return own + self.expand(functional.gelu(found))

    def _seen(self, tokens: Tokens) -> Tensor:
        """Normalised states, 0 on padding: whatever stands there is multiplied by a weight of 0."""
        seen: Tensor = self.norm(tokens.hidden.float())
        return seen.masked_fill(~tokens.valid.unsqueeze(-1), 0.0) if tokens.padded else seen

    def multiply_adds(self, work: Work) -> int:
        """Keys and values of all tokens, queries and results of survivors, and the attention between them."""
        projected = 2 * work.tokens + 2 * work.kept + self.question
        return self.dim * (projected * work.width + 2 * work.kept * work.tokens) + work.kept * work.tokens
