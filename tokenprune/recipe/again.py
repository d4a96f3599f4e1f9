"""`Again`: when a question that was asked cheaply is asked again with everything."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tokenprune.parts.limits import Share, ShareOrNone
from tokenprune.recipe.part_models import Spec


class Again(Spec):
    """A first pass with smaller pictures and the recipe's stages, and a second one without either where it is not sure.

    What makes a pass unsure: the model asks for more in words that it was trained to use, or its first token is not
    probable enough.
    """

    pixels: Share = Field(default=0.25, description="Share of its pixels that each picture keeps in the first pass")
    below: ShareOrNone = Field(
        default=0.8, description="Ask again where the probability of the answer's first token is lower; 0 for never"
    )
    request: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Ask again where the first answer contains this text"
    )

    def unsure(self, answer: str, probability: float) -> bool:
        """Whether a first pass with this answer, and this probability of its first token, is to be asked again."""
        return probability < self.below or (self.request is not None and self.request in answer)
