"""Types of the parts' settings, with their limits: recipes, their JSON Schema and their help are made from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(gt=0, le=1)]
"""A share in (0, 1]."""
ShareOrNone = Annotated[float, Field(ge=0, le=1)]
"""A share in [0, 1], where 0 means none at all."""
TokenCount = Annotated[int, Field(ge=1, le=1_000_000)]
"""A number of vision tokens."""
Keep = TokenCount | Share
"""A count (written without a decimal point), or a share in (0, 1]."""
KeepOrNothing = Annotated[int, Field(ge=0, le=1_000_000)] | Share
"""As `Keep`, or the count 0."""
Stride = Annotated[int, Field(ge=1, le=256)]
"""Every so many rows and columns."""
Offset = Annotated[int, Field(ge=0, le=255)]
"""The first row and column of a strided lattice."""
Phase = Annotated[int, Field(ge=0, le=3)]
"""Which of four shifts an even layout has."""
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A seed for the hash that stands in for a random generator."""
Width = Annotated[int, Field(ge=4, le=4096)]
"""Numbers inside a learned part."""
TowerBlock = (
    Annotated[int, Field(ge=-9999, le=9999)]
    | Annotated[str, Field(pattern=r"^([0-9]{1,2}(\.[0-9]{1,6})?%|[0-9]{1,4}/[0-9]{1,4})$")]
    | None
)
"""A block of the vision tower, counted from 0 or, below 0, from the end, or a share of its depth; None: the last one
that the projector reads."""
Window = Annotated[int, Field(ge=1, le=4096)]
"""So many tokens that lie nearest on the picture, the token itself among them."""
