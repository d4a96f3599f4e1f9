"""`Again`: when a question that was asked cheaply is asked again with everything."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tokenprune.parts.learned import Weights
from tokenprune.parts.limits import Share, ShareOrNone
from tokenprune.recipe.part_models import Spec


class Again(Spec):
    """A first pass with smaller pictures and the recipe's stages, and a second one without either where it is not sure.

    What makes a pass unsure: the model asks for more in words that it was trained to use, a head that was trained
    beside it asks, or its first token is not probable enough.
    """

    pixels: Share = Field(default=0.25, description="Share of its pixels that each picture keeps in the first pass")
    below: ShareOrNone = Field(
        default=0.8, description="Ask again where the probability of the answer's first token is lower; 0 for never"
    )
    request: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Ask again where the first answer contains this text"
    )
    weights: Weights | None = Field(
        default=None, description="Of a learned request, which `tokenprune fit` makes: FILE.safetensors#DIGEST"
    )
    above: Share = Field(default=0.5, description="Ask again where the learned request is more probable; 1.0 for never")

    def unsure(self, answer: str, probability: float, asks: float | None = None) -> bool:
        """Whether a first pass is to be asked again.

        Args:
            answer: it gave.
            probability: of its first token.
            asks: probability of the learned request; None where there is none.
        """
        in_words = self.request is not None and self.request in answer
        return probability < self.below or in_words or (asks is not None and asks > self.above)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with defaults filled in; of the learned request where there is one, or `above` is another."""
        data = self.model_dump()
        # Left out otherwise, so that recipes from before it was there keep their fingerprints.
        if self.weights is None:
            del data["weights"]
            if self.above == type(self).model_fields["above"].default:
                del data["above"]
        return data
