"""Recycling into the survivors themselves: each dropped token flows into the nearest."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.core import gram, ops, transfer
from tokenprune.core.grids import Grid
from tokenprune.core.merge import Merge
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Count, Tokens
from tokenprune.core.video import frame_numbers
from tokenprune.errors import InputError
from tokenprune.parts.limits import Share, Window
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.surroundings import in_surroundings
from tokenprune.parts.work import Work


class NearestRecycler(Recycler):
    """Adds every dropped token to the survivor that it is most like, by cosine of hidden states.

    No token is added: what is kept is what is left. VScan, HoliTom, FastVID, ERA and RESTORE differ in the average.

    Args:
        average: a survivor becomes the plain ``mean`` of itself and all that joins it (VScan); that mean weighted by
            ``mass``, so that a token which stands for many counts as many (RESTORE, ToMe); or the ``blend`` of its own
            state and the mean of what joins it (FastVID, HoliTom).
        own: with ``blend``, the survivor's own weight, or that of the plain mean if that is higher; higher moves it
            less (FastVID's β).
        within: tokens may join any survivor of the ``sample``, those of their ``frame``, the latest one at their
            ``place`` in an earlier frame (a static token over time, PruneVid), or those that came in at ``odd`` places
            (ToMe, behind the scorer ``alternate``). Who finds none is dropped.
        rounds: so many times, survivors move to the mean of those that join them, and all others join anew (k-means,
            whose first centres are the survivors); 0 lets tokens join the survivors themselves.
        window: with ``sample``, tokens prefer survivors among so many tokens that lie nearest on the picture, where how
            unlike they are weighs the less the nearer they lie (AiluRus's λ); None: it does not matter where.
    """

    def __init__(
        self,
        *,
        average: Literal["mean", "mass", "blend"] = "mean",
        own: Share = 0.6,
        within: Literal["sample", "frame", "place", "odd"] = "sample",
        rounds: Annotated[int, Field(ge=0, le=100)] = 0,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.average = average
        self.own = own
        self.within = within
        self.rounds = rounds
        self.window = window
        self.check()
        if rounds and within == "place":
            raise InputError(f"recycler 'nearest': {rounds} rounds, but what joins by its place does not by likeness")
        if window is not None and within != "sample":
            raise InputError(f"recycler 'nearest': a window of {window} goes with within: sample, not {within}")

    def added(self, dropped: int) -> int:
        return 0

    def multiply_adds(self, work: Work) -> int:
        """Distances of all tokens to the survivors, where they are asked, and sums of states and masses of members."""
        compared = work.width * (self.within != "place") * (1 + 2 * self.rounds)
        return work.tokens * work.kept * (compared + work.width + 1)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        counts = tokens.counts(count)
        batch, n = tokens.valid.shape
        if counts == tokens.sizes or not any(counts):
            return None
        padded = ops.ragged(counts)
        at = kept.clamp(min=0) if padded else kept
        real = kept >= 0
        number = torch.arange(kept.shape[1], device=kept.device)
        unit = torch.nn.functional.normalize(tokens.hidden.float(), dim=-1)
        centres = ops.take_rows(unit, at)
        for left in reversed(range(self.rounds + 1)):
            apart = self._apart(tokens, at, real, unit, centres).masked_fill(~real.unsqueeze(1), torch.inf)
            joins = ops.put_(apart.argmin(-1), at, number.expand_as(at), real)  # a survivor joins itself
            finds = apart.gather(2, joins.unsqueeze(-1)).squeeze(-1).isfinite() | ops.mask_of(kept, n, padded=padded)
            member = (joins.unsqueeze(1) == number.unsqueeze(-1)) & (finds & tokens.valid).unsqueeze(1)
            if left:
                means = member.float() @ unit.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
                centres = torch.nn.functional.normalize(means, dim=-1)
        source = torch.arange(n, device=kept.device).expand(batch, n)
        return Merge(
            source=source.masked_fill(~tokens.valid, -1) if tokens.padded else source,
            target=kept,
            weight=self._weights(member.float(), at, tokens.mass),
            hard=self.average == "mean",
            anchors=(0,) * batch,
            mean=self.average != "blend",
            source_counts=None if tokens.padded else tokens.sizes,
            share=member.float(),
        )

    @property
    def reads(self) -> Needs:
        return Needs(grid=self.within in ("frame", "place") or self.window is not None)

    def _apart(self, tokens: Tokens, at: Tensor, real: Tensor, unit: Tensor, centres: Tensor) -> Tensor:
        """``[B, N, K]`` how far tokens are from the `centres` of survivors, infinite where they may not join them.

        `real` survivors are no padding; between the unit vectors of tokens and centres, the nearest is the most alike.
        """
        if self.within == "place":
            place, frame = (transfer.upload(x, at.device) for x in place_table(tokens.grids))
            index = tokens.origin.clamp(min=0)
            place, frame = place.gather(1, index), frame.gather(1, index)
            ahead = (frame.unsqueeze(2) - frame.gather(1, at).unsqueeze(1)).float()
            here = place.unsqueeze(2) == place.gather(1, at).unsqueeze(1)
            return ahead.where(here & (ahead > 0), torch.inf)
        apart = gram.distances(unit, centres)
        if self.within == "frame":
            frame = tokens.cell[..., 0]
            apart = apart.masked_fill(frame.unsqueeze(2) != frame.gather(1, at).unsqueeze(1), torch.inf)
        if self.within == "odd":
            apart = apart.masked_fill((at % 2 == 0).unsqueeze(1), torch.inf)
        if self.window is not None:
            near = in_surroundings(apart, tokens, self.window, at).masked_fill(~real.unsqueeze(1), torch.inf)
            apart = torch.where(near.isfinite().any(-1, keepdim=True), near, apart)
        return apart

    def _weights(self, member: Tensor, at: Tensor, mass: Tensor) -> Tensor:
        if self.average == "mean":
            return member
        if self.average == "mass":
            return member * mass.unsqueeze(1)
        others = member.sum(-1) - 1
        own = (1 / (others + 1)).clamp(min=self.own).unsqueeze(-1)
        share = (1 - own) / others.clamp(min=1).unsqueeze(-1)
        number = torch.arange(member.shape[2], device=at.device)
        return member * torch.where(number == at.unsqueeze(-1), own, share)


# In a compiled model the table of a picture is a constant, like a plan: one graph a shape.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def place_table(grids: tuple[tuple[Grid, ...], ...]) -> tuple[Tensor, Tensor]:
    """`frame_numbers` of each sample: places and frames ``[B, M]``, 0 padded; M at least 1."""
    found = [frame_numbers(own) for own in grids]
    most = max([1, *(len(place) for place, _ in found)])
    tables = ([[*row[i], *[0] * (most - len(row[i]))] for row in found] for i in range(2))
    place, frame = (torch.tensor(table, dtype=torch.int64) for table in tables)
    return place, frame
