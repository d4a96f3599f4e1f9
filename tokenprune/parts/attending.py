"""What parts that read the attention of raters share."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.tokens import Attention, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.part import Part


def attention_of(part: Part, tokens: Tokens, raters: Tensor | None) -> tuple[Attention, Tensor]:
    """The attention at hand and the rater weights to ask it with.

    Raises:
        InputError: there is no attention at this place, or the stage has no raters.
    """
    if raters is None:
        raise InputError(f"{part.title} needs raters: give the stage one, for example 'last_text'")
    if tokens.attention is None:
        raise InputError(
            f"{part.title} needs the attention of a language model: there is none at this place. Give "
            "Tokens(attention=...), see tokenprune.core.attention, or prune before a layer instead of after vision"
        )
    return tokens.attention, raters
