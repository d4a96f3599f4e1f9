"""Greedy selection: one loop that takes the token of highest gain, and the gains that methods differ in.

A gain holds ``value [B, N]``, what each token would add now, and `take` brings it up to date behind a pick. Each pick
costs O(N), or O(N · picks) for the determinant, and none waits for the device. The first picks do not depend on how
many follow: a smaller count is a prefix of a larger one. Of equal gains the lower index wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokenprune.core import ops

SPENT = 1e-5
"""Share of a token's own kernel entry below which what other picks have left of it counts as rounding, and as 0."""
WIDE = {False: torch.float64, True: torch.float32}
"""What sums are in, by whether the device is Apple's, which has no float64."""
BLOCK = 128
"""Rows that a CPU goes over at once: as many as stay in its cache."""


class Gain(Protocol):
    """What each token would add to those picked so far."""

    @property
    def value(self) -> Tensor:
        """``[B, N]``, any real dtype; -inf (or the lowest number) never wins against a token that may be taken."""

    def take(self, pick: Tensor) -> None:
        """Bring `value` up to date, given ``[B]`` the token that each sample has just picked."""


def greedy(gain: Gain, counts: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Tokens in the order in which they were picked: ``[B, max(counts)]`` int64, -1 padded on the right.

    Args:
        gain: of a batch; it is used up.
        counts: picks of each sample, at most its valid tokens.
        valid: ``[B, N]`` bool, tokens that may be picked; None: all.
    """
    most = max(counts, default=0)
    floor = -torch.inf if gain.value.is_floating_point() else torch.iinfo(gain.value.dtype).min
    out = torch.zeros_like(gain.value, dtype=torch.bool) if valid is None else ~valid
    picks = []
    for left in reversed(range(most)):
        pick = gain.value.masked_fill(out, floor).argmax(1)
        picks.append(pick)
        if left:
            out = out.scatter(1, pick.unsqueeze(1), True)
            gain.take(pick)
    if not picks:
        return torch.empty(len(counts), 0, dtype=torch.int64, device=gain.value.device)
    order = torch.stack(picks, 1)
    return order.masked_fill(~ops.first(counts, most, order.device), -1) if ops.ragged(counts) else order


def _row(matrix: Tensor, pick: Tensor) -> Tensor:
    """Row ``[B, N]`` that each sample of `matrix` ``[B, N, N]`` has at `pick` ``[B]``."""
    return ops.take_rows(matrix, pick.unsqueeze(1)).squeeze(1)


class MaxMin:
    """Distance to the nearest token picked: greedy k-centre (DivPrune).

    The first pick is the token whose nearest other token is farthest away, of a lone token itself.

    Args:
        similarity: ``[B, N, N]`` symmetric; distance is 1 - similarity.
        valid: ``[B, N]`` bool; None: all.
    """

    def __init__(self, similarity: Tensor, valid: Tensor | None = None) -> None:
        self._similarity = similarity
        others = similarity.clone()
        others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        if valid is not None:
            others.masked_fill_(~valid.unsqueeze(1), -torch.inf)
        self.value = -others.amax(1)
        self._nearest: Tensor | None = None

    def take(self, pick: Tensor) -> None:
        row = -_row(self._similarity, pick)
        self._nearest = row if self._nearest is None else torch.minimum(self._nearest, row)
        self.value = self._nearest


class MaxSum:
    """Sum of distances to the tokens picked (ToDRE); the first pick is the token with the largest sum to all.

    Args:
        similarity: ``[B, N, N]`` symmetric; distance is 1 - similarity.
        valid: ``[B, N]`` bool; None: all.
    """

    def __init__(self, similarity: Tensor, valid: Tensor | None = None) -> None:
        self._similarity = similarity
        known = similarity if valid is None else similarity.masked_fill(~valid.unsqueeze(1), 0.0)
        # In float64, where the order of a sum of float32 does not decide between equal tokens.
        self.value = -known.sum(2, dtype=WIDE[similarity.device.type == "mps"])
        self._first = True

    def take(self, pick: Tensor) -> None:
        # As far as the order of tokens goes, a sum of distances is minus the sum of similarities.
        row = _row(self._similarity, pick).to(self.value.dtype)
        self.value = -row if self._first else self.value - row
        self._first = False


class Coverage:
    """How much better all tokens would be covered: facility location, Σ_j w_j · max(0, s_jc - covered_j) · v_c.

    Without candidate weights it is submodular, and greedy is within 1 - 1/e of the best set; with them (SCOPE) it is
    not. Exact at each pick: on a CPU only rows whose cover has grown are gone over, a few times each in all; elsewhere
    all are, since a choice of rows would have to be waited for.

    Args:
        similarity: ``[B, M, N]`` how well candidate c of N covers row j of M; below 0 counts as not at all.
        covered: ``[B, M]`` weights w of the rows, at least 0; None: 1. 0 where a row is padding.
        candidate: ``[B, N]`` weights v of the candidates, at least 0; None: 1.
    """

    def __init__(self, similarity: Tensor, covered: Tensor | None = None, candidate: Tensor | None = None) -> None:
        self._similarity = similarity.clamp(min=0)
        batch, rows, _ = similarity.shape
        self._weight = similarity.new_ones(batch, rows) if covered is None else covered.to(similarity.dtype)
        self._candidate = candidate
        self._cover = similarity.new_zeros(batch, rows)
        weighted = self._similarity if covered is None else self._similarity * self._weight.unsqueeze(-1)
        self._gain = weighted.sum(1, dtype=WIDE[similarity.device.type == "mps"])
        self._sparse = similarity.device.type == "cpu" and not torch.compiler.is_compiling()

    @property
    def value(self) -> Tensor:
        return self._gain if self._candidate is None else self._gain * self._candidate

    def take(self, pick: Tensor) -> None:
        at = pick.view(-1, 1, 1).expand(-1, self._similarity.shape[1], 1)
        cover = torch.maximum(self._cover, self._similarity.gather(2, at).squeeze(2))
        if self._sparse:
            for row in range(len(pick)):
                for grown in (cover[row] > self._cover[row]).nonzero().squeeze(1).split(BLOCK):
                    rows = self._similarity[row].index_select(0, grown)
                    self._gain[row] -= _lost(rows, self._cover[row, grown], cover[row, grown], self._weight[row, grown])
        else:
            self._gain = self._gain - _lost(self._similarity.clone(), self._cover, cover, self._weight)
        self._cover = cover


def _lost(rows: Tensor, before: Tensor, now: Tensor, weight: Tensor) -> Tensor:
    """What each candidate can add no more, ``[..., N]``, once rows are covered as `now` instead of as `before`.

    `rows` ``[..., M, N]`` are written over. The sum is wide: late gains are small differences of large sums.
    """
    low = before.unsqueeze(-1)
    torch.minimum(torch.maximum(rows, low, out=rows), now.unsqueeze(-1), out=rows)
    return rows.sub_(low).mul_(weight.unsqueeze(-1)).sum(-2, dtype=WIDE[rows.device.type == "mps"])


class Determinant:
    """What a token's kernel row has beyond those picked: greedy MAP of a determinantal point process (CDPruner).

    Its logarithm is what log det of the picked kernel grows by. A Cholesky factor grows with the picks. Once nothing is
    left of any token (more picks than the kernel has rank), tokens follow by `fallback`.

    Args:
        kernel: ``[B, N, N]`` float32, symmetric and positive semidefinite.
        picks: as many as will be made at most.
        fallback: ``[B, N]`` finite order of tokens of which nothing is left; higher first.
    """

    def __init__(self, kernel: Tensor, picks: int, fallback: Tensor) -> None:
        self._kernel = kernel
        self._own = kernel.diagonal(dim1=1, dim2=2)
        self._left = self._own.clone()
        self._factor = kernel.new_zeros(kernel.shape[0], max(picks, 1), kernel.shape[1])
        self._made = 0
        order = fallback.float().sort(dim=1, stable=True, descending=True).indices
        rank = torch.arange(kernel.shape[1], device=kernel.device).expand_as(order)
        self._behind = -1.0 - torch.zeros_like(self._left).scatter(1, order, rank.to(self._left.dtype))

    @property
    def value(self) -> Tensor:
        return torch.where(self._left > 0, self._left, self._behind)

    def take(self, pick: Tensor) -> None:
        at = pick.unsqueeze(1)
        factor = self._factor[:, : self._made]
        column = factor.gather(2, at.unsqueeze(1).expand(-1, self._made, 1))
        left = self._left.gather(1, at)
        rest = _row(self._kernel, pick) - (column.mT @ factor).squeeze(1)
        rest = torch.where(left > 0, rest * left.clamp(min=torch.finfo(left.dtype).tiny).rsqrt(), 0.0)
        self._factor[:, self._made] = rest
        self._made += 1
        left_over = self._left - rest.square()
        self._left = torch.where(left_over > SPENT * self._own, left_over, 0.0)


class Suppression:
    """Scores, where a pick puts back all tokens too much like it: greedy non-maximum suppression (GreedyPrune).

    Once all others are put back, they follow by their scores, so that the count is exact.

    Args:
        scores: ``[B, N]``.
        similarity: ``[B, N, N]``.
        threshold: a token more alike than this to one that was picked from the front is put back; ``[B, 1]`` where
            each sample has its own.
    """

    def __init__(self, scores: Tensor, similarity: Tensor, threshold: float | Tensor) -> None:
        self._similarity = similarity
        self._threshold = threshold
        self._n = scores.shape[1]
        order = (scores.float() + 0.0).sort(dim=1, stable=True, descending=True).indices
        rank = torch.arange(2 * self._n, self._n, -1, device=scores.device).expand_as(order)
        self.value = torch.zeros_like(order).scatter(1, order, rank)  # above n: nothing like it was picked

    def take(self, pick: Tensor) -> None:
        back = (_row(self._similarity, pick) > self._threshold) & (self.value > self._n)
        self.value = self.value - self._n * back
