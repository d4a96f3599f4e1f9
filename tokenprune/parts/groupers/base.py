"""The base class of groupers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from tokenprune.core.groups import Groups, share_by, share_out
from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part


class Grouper(Part):
    """Splits the vision tokens into groups that share the count out. Base class of the role ``grouper``.

    A stage asks it behind scorer and scheduler: the scheduler (or the budget) says how many tokens of a sample survive,
    the grouper how many of each group, and the sampler then picks them group by group.
    """

    role = "grouper"
    suffix = "Grouper"

    @property
    def static(self) -> bool:
        """Whether groups and their shares follow from shapes alone, as long as nothing has been dropped before."""
        return True

    @abstractmethod
    def forward(self, tokens: Tokens) -> Groups:
        """The group of every token."""

    def share(self, groups: Groups, counts: Sequence[int], scores: Tensor) -> tuple[tuple[int, ...], ...]:
        """Tokens to keep of each group of each sample; a sample's shares sum up to its count, none exceeds its group.

        In proportion to `Groups.weights`, or to the groups' sizes without, by largest remainder.

        Args:
            groups: as `forward` has them.
            counts: tokens to keep of each sample.
            scores: ``[B, N]`` float32, for parts that let them decide.
        """
        if groups.weights is None:
            return tuple(tuple(share_out(count, sizes)) for count, sizes in zip(counts, groups.sizes, strict=True))
        due = zip(counts, groups.sizes, groups.weights, strict=True)
        return tuple(tuple(share_by(count, sizes, weights)) for count, sizes, weights in due)
