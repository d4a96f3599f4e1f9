"""What parts that read the vision tower share: the block that a setting means, and merging before the projector."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.merge import Merge, merge
from tokenprune.core.needs import Needs, tower_signal
from tokenprune.core.place import PlaceError, block_at
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.limits import TowerBlock
from tokenprune.parts.part import Part
from tokenprune.parts.work import Work

MERGES_BEFORE = Needs(tower="hidden", projector=True)
"""What a part reads that merges what the projector reads."""


def signal_of(part: Part, signal: str, block: TowerBlock) -> str:
    """The name of a tower signal of `block`.

    Raises:
        InputError: `block` is no share of a depth; `part` opens the message.
    """
    if isinstance(block, str):
        try:
            block_at(block)
        except PlaceError as error:
            raise InputError(f"{part.title}: block {error.template.replace('{got}', repr(block))}") from None
    return tower_signal(signal, block)


def merged_before_projector(tokens: Tokens, plan: Merge) -> Tensor:
    """New states ``[B, M, D]`` of the plan's targets, merged in front of the projector.

    Where it does not take tokens one by one, and without a model around, what it has given is merged.
    """
    if tokens.projector is None:
        return merge(tokens.hidden, plan)
    read = tokens.signal("hidden")
    return tokens.projector(merge(read, plan).to(read.dtype))


def merging_cost(work: Work, sources: int, targets: int, *, before_projector: bool) -> int:
    """Sums of states and masses of so many sources for each target, and the projector for targets in front of it."""
    if before_projector and work.projected:
        return targets * (sources * (work.tower_width + 1) + work.projected)
    return targets * sources * (work.width + 1)
