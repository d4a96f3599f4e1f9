"""What parts that read the vision tower share: the block that a setting means."""

from __future__ import annotations

from tokenprune.core.needs import tower_signal
from tokenprune.core.place import PlaceError, block_at
from tokenprune.errors import InputError
from tokenprune.parts.limits import TowerBlock
from tokenprune.parts.part import Part


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
