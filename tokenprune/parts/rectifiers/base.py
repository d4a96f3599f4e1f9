"""The base class of rectifiers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tokenprune.core.tokens import Tokens
from tokenprune.parts.part import Part


class Rectifier(Part):
    """Gives the survivors' keys a bias. Base class of the role ``rectifier``.

    When tokens go, the attention that they got moves to the text and to whatever else is left. A bias on a survivor's
    key is added to every attention logit that later queries form with it: in all later layers, in the prefill and in
    each decode step. A stage asks it last, behind the recycler, and only if something was dropped.
    """

    role = "rectifier"
    suffix = "Rectifier"

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """Biases ``[B, N]`` float32, finite, of the N tokens that the stage has left, merged ones among them.

        They replace those of an earlier stage, which are `tokens.bias`. Padding counts for nothing.
        """
