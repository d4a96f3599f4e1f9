"""Groups of tokens that vary together: by principal components."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from tokenprune.core import transfer
from tokenprune.core.groups import Groups
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.parts.groupers.base import Grouper
from tokenprune.parts.samplers.greedy import Features, features
from tokenprune.parts.work import Work

NOTHING = 1e-12
"""Share of the largest variance below which a component is rounding."""


class PrincipalGrouper(Grouper):
    """Tokens by the principal component that they weigh most on, of the sigmoid of their features (PruneSID).

    Tokens are the variables and channels the observations: a component is a pattern over the picture, and a token
    belongs to the pattern in which it has the largest part, of either sign. The host waits for the device once at the
    stage and works the components out itself, sample by sample: eigenvectors of a matrix as wide as there are tokens or
    channels, whichever are fewer. For a picture of many tokens that takes longer than any other part here.

    Args:
        components: so many at most; of fewer that have any variance, all. Higher gives more, smaller groups.
        features: ``hidden`` states at the place, or what the ``tower`` has given to the projector.
    """

    def __init__(self, *, components: Annotated[int, Field(ge=1, le=1024)] = 16, features: Features = "tower") -> None:
        super().__init__()
        self.components = components
        self.features = features
        self.check()

    @property
    def static(self) -> bool:
        return False

    @property
    def reads(self) -> Needs:
        return Needs(tower="hidden") if self.features == "tower" else Needs()

    def forward(self, tokens: Tokens) -> Groups:
        x = features(tokens, self.features).float().cpu().double()
        index = torch.full(tokens.valid.shape, -1, dtype=torch.int64)
        sizes = []
        for row, size in enumerate(tokens.sizes):
            own = loads_most(torch.sigmoid(x[row, :size]).numpy(), self.components)
            index[row, :size] = torch.from_numpy(own)
            sizes.append(tuple(np.bincount(own).tolist()))
        grids = tuple(tuple((1, 1, size) for size in own) for own in sizes)
        return Groups(transfer.upload(index, tokens.valid.device), tuple(sizes), grids)

    def multiply_adds(self, work: Work) -> int:
        """Products of all features; the decomposition itself is not a product."""
        width = work.tower_width if self.features == "tower" else work.width
        return work.tokens * width * min(work.tokens, width)


def loads_most(x: NDArray[np.float64], components: int) -> NDArray[np.int64]:
    """The component, from 0 on in descending order of variance, on which each of N tokens ``[N, D]`` weighs most."""
    centred = x - x.mean(1, keepdims=True) if x.size else x
    tall = len(x) > x.shape[1]
    variance, vectors = np.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    order = [i for i in np.argsort(-variance, kind="stable")[:components] if variance[i] > NOTHING * variance.max()]
    if not order:
        return np.zeros(len(x), dtype=np.int64)
    loads = np.abs(centred @ vectors[:, order] / np.sqrt(variance[order]) if tall else vectors[:, order])
    return np.argmax(np.round(loads, 9), axis=1)
