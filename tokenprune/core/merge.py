"""`Merge`: which tokens are added to which survivors, as data; one function applies it, its inverse restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.core import gram, ops, transfer
from tokenprune.core.tokens import Tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Merge:
    """A plan of what flows where when N tokens become fewer: P sources, M targets.

    A target's new state is the weighted sum (or mean) of its sources and of nothing else: a survivor that shall keep a
    part of itself is a source of itself. Mergers (clusters, bipartite matching, pooling, optimal transport) differ in
    this plan alone.

        source  3  7  8 12          weight   3  7  8 12
        target  3 12                    3    1  1  .  .      token 3 becomes the sum of tokens 3 and 7
                                       12    .  .  1  1      token 12 that of tokens 8 and 12
    """

    source: Tensor
    """``[B, P]`` int64 indices into N of the tokens that flow; -1 on padding."""
    target: Tensor
    """``[B, M]`` int64 indices into N of the tokens that take them in; -1 padded on the right. Anchors first: dropped
    tokens whose slot, position and origin the merged token takes over; then survivors. Both ascending."""
    weight: Tensor
    """``[B, M, P]`` float32, at least 0: how much of each source each target's state takes; 0 on padding."""
    anchors: tuple[int, ...]
    """How many targets of each sample are anchors: known on the host, as they decide how many tokens are left."""
    hard: bool = False
    """Whether all weights are 0 or 1, which half precision holds exactly; the product may then be in half precision."""
    mean: bool = True
    """Whether a target's sum is divided by its weights; else it stays the sum."""
    source_counts: tuple[int, ...] | None = None
    """How many sources each sample has, where the host knows; it spares a look at the padding."""
    share: Tensor | None = None
    """``[B, M, P]`` float32, what part of each source's mass goes to each target; None: all of it, wherever the weight
    is not 0."""

    @property
    def padded(self) -> bool:
        """Whether targets are padded: known on the host. Plans with survivors among the targets count as padded."""
        return ops.ragged(self.anchors) or self.target.shape[1] != max(self.anchors, default=0)

    @property
    def anchor(self) -> Tensor:
        """``[B, A]`` indices into N of the anchors, -1 padded on the right."""
        most = max(self.anchors, default=0)
        anchor = self.target[:, :most]
        if not ops.ragged(self.anchors):
            return anchor
        return anchor.masked_fill(~ops.first(self.anchors, most, anchor.device), -1)

    @property
    def shares(self) -> Tensor:
        """``[B, M, P]`` float32: `share`, filled in where it was left out."""
        if self.share is not None:
            return self.share
        return self.weight if self.hard else (self.weight > 0).float()

    @property
    def sources(self) -> Tensor:
        """`source`, 0 on padding, so that it may index; what is gathered there has weight 0."""
        if self.source_counts is not None and not ops.ragged(self.source_counts):
            return self.source
        return self.source.clamp(min=0)


def only(plan: Merge, samples: Sequence[bool]) -> Merge:
    """`plan`, which has survivors alone for targets, for these samples of the batch; it does nothing to the others.

    A learned part needs it: what it writes is not what was there even where nothing was dropped, and a sample must not
    depend on whether others of its batch lose tokens.
    """
    if all(samples):
        return plan
    on = transfer.ints(samples, plan.target.device).bool()
    return replace(
        plan,
        target=plan.target.masked_fill(~on[:, None], -1),
        weight=plan.weight * on[:, None, None],
        share=None if plan.share is None else plan.share * on[:, None, None],
    )


def merge(x: Tensor, plan: Merge) -> Tensor:
    """New rows of the targets, ``[B, M, D, ...]`` float32, from all rows ``[B, N, D, ...]``; anything on padding.

    One product with the weights: the same result in every batch, and on every run of a GPU, where adding row by row
    would depend on the order in which threads come. Sums are float32 whatever the dtype.
    """
    if x.dim() > 3:
        return merge(x.flatten(2), plan).unflatten(2, x.shape[2:])
    rows = ops.take_rows(x, plan.sources)
    total = gram.products(plan.weight.to(rows.dtype), rows.mT) if plan.hard else plan.weight @ rows.float()
    if plan.mean:
        # Padded targets have no weights: nothing is divided by nothing there.
        total = total / plan.weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return total


def merged_mass(mass: Tensor, plan: Merge) -> Tensor:
    """What the targets stand for, ``[B, M]`` float32, from the mass of all tokens ``[B, N]``.

    Nothing is lost where the shares of each source sum to 1.
    """
    return (plan.shares @ mass.gather(1, plan.sources).unsqueeze(-1)).squeeze(-1)


def reduce(tokens: Tokens, kept: Tensor, counts: tuple[int, ...], plan: Merge, states: Tensor) -> tuple[Tokens, Tensor]:
    """What is left of `tokens` after a plan: survivors and anchors in raster order, merged states and masses in place.

    Args:
        tokens: the N tokens that came in.
        kept: ``[B, K]`` indices into N of the survivors, ascending, -1 where padded.
        counts: survivors of each sample.
        plan: what flows into survivors and anchors.
        states: ``[B, M, D]`` new hidden states of the targets; see `merge`.

    Returns:
        The tokens that are left, and ``[B, M]`` which of them were written, -1 on padding.
    """
    survives = ops.mask_of(kept, tokens.hidden.shape[1], padded=ops.ragged(counts))
    if any(plan.anchors):
        anchor = plan.anchor
        survives = ops.put_(survives, anchor, True, anchor >= 0 if ops.ragged(plan.anchors) else None)
    counted = survives.cumsum(1)
    sizes = tuple(k + a for k, a in zip(counts, plan.anchors, strict=True))
    taken = tokens.take(ops.counted_places(counted, sizes), sizes)
    valid = plan.target >= 0 if plan.padded else None
    rank = counted.gather(1, plan.target if valid is None else plan.target.clamp(min=0)) - 1
    hidden = ops.put_rows_(taken.hidden, rank, states.to(taken.hidden.dtype), valid)
    mass = ops.put_(taken.mass, rank, merged_mass(tokens.mass, plan), valid)
    return replace(taken, hidden=hidden, mass=mass), rank if valid is None else rank.masked_fill(~valid, -1)


def unmerge(x: Tensor, left: Tensor, plan: Merge | None, total: int) -> Tensor:
    """The full grid ``[B, N, D, ...]`` from the rows that were left: the inverse of `merge`.

    Each source gets back what its target has become (of several targets, their mean by shares). Rows of tokens that
    went nowhere are 0.

    Args:
        x: ``[B, K, D, ...]`` rows of the tokens that were left.
        left: ``[B, K]`` their indices into N, -1 on padding.
        plan: how the others were merged; None: they were dropped.
        total: N.
    """
    rows = x.flatten(2)
    full = rows.new_zeros(x.shape[0], total, rows.shape[2])
    full = ops.put_rows_(full, left, rows, left >= 0)
    if plan is not None:
        shares = plan.shares.mT  # [B, P, M]
        back = shares @ ops.take_rows(full, plan.target.clamp(min=0)).float()
        back = back / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        flows = (plan.source >= 0) & (shares.sum(-1) > 0)
        full = ops.put_rows_(full.contiguous(), plan.source, back.to(full.dtype), flows)
    return full.unflatten(2, x.shape[2:])
