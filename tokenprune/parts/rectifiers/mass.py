"""Biases from the number of tokens that a survivor stands for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from tokenprune.core.tokens import Tokens
from tokenprune.parts.rectifiers.base import Rectifier
from tokenprune.parts.work import no_products


class LogMassRectifier(Rectifier):
    """The logarithm of a token's mass: it then weighs in the softmax as if its originals all stood there.

    Proportional attention (ToMe, arXiv:2210.09461, section 3), carried into the language model by RESTORE and ERA.

    Args:
        strength: factor of the logarithm; 0 adds nothing, 1 is proportional attention, higher exaggerates it.
    """

    multiply_adds = no_products

    def __init__(self, *, strength: Annotated[float, Field(ge=0, le=4)] = 1.0) -> None:
        super().__init__()
        self.strength = strength
        self.check()

    def forward(self, tokens: Tokens) -> Tensor:
        # A mass below 1 is no reason to hide a token, and padding has mass 0.
        return self.strength * tokens.mass.clamp(min=1.0).log()
