"""Asking twice: a cheap first pass, and one with everything where its answer is not sure (`Again`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenprune.engine.attach import attach
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.evaluate.conditions import shrink
from tokenprune.study.evaluate.cost import Meter

if TYPE_CHECKING:
    from tokenprune.core.pictures import Picture
    from tokenprune.core.report import Report
from tokenprune.families.chat import Chat


@dataclass(frozen=True)
class Pass:
    """One pass: the prompt was read and an answer given."""

    name: Literal["first", "full"]
    text: str
    """Its answer."""
    probability: float
    """Of the answer's first token, as the model has it."""
    multiply_adds: int | None
    """Of the prefill, from the pixels to the first token; None where the prompt does not tell the grids."""
    report: Report
    """Vision tokens that entered each layer."""


def ask_twice(
    chat: Chat, pictures: Sequence[Picture], question: str, recipe: Recipe, max_new_tokens: int
) -> tuple[Pass, ...]:
    """The first pass of a recipe with `again`, and the full one where that is not sure; the last one has answered.

    Raises:
        InputError: smaller pictures have as many vision tokens as full ones on this model.
    """
    again = recipe.again
    assert again is not None, "nothing says when to ask again"
    full = chat.inputs(pictures, question)
    first = full
    if again.pixels < 1:
        first = chat.inputs([shrink(_image(each), again.pixels)[0] for each in pictures], question)
        small, large = _vision_tokens(chat, first), _vision_tokens(chat, full)
        if small >= large:
            other = "; give pixels 1.0 and keep 0.25 to pool tokens instead (the variant `pooled` of visionthink)"
            raise InputError(
                f"{recipe.name}: with again.pixels {again.pixels} this prompt has {small} vision tokens, with full "
                f"pictures {large}: the model's tower sees both at one size, so a smaller picture saves nothing{other}"
            )
    one = one_pass(chat, first, recipe.first_pass, "first", max_new_tokens)
    if not again.unsure(one.text, one.probability):
        return (one,)
    return one, full_pass(chat, full, max_new_tokens)


def full_pass(chat: Chat, inputs: dict[str, Tensor], max_new_tokens: int) -> Pass:
    """An answer with all vision tokens."""
    return one_pass(chat, inputs, load_recipe("none"), "full", max_new_tokens)


def one_pass(
    chat: Chat, inputs: dict[str, Tensor], recipe: Recipe, name: Literal["first", "full"], max_new_tokens: int
) -> Pass:
    """An answer under one recipe, with how sure it is and what its prefill cost."""
    first = _FirstToken()
    with attach(chat.model, recipe) as attached:
        (ids,) = chat.generate(inputs, max_new_tokens, logits_processor=[first])
    try:
        (cost,) = Meter(chat.model).prefills(recipe, attached.report, inputs["input_ids"], inputs["attention_mask"])
    except (InputError, UnsupportedModelError):
        return Pass(name, chat.text(ids), first.probability, None, attached.report)
    return Pass(name, chat.text(ids), first.probability, cost, attached.report)


class _FirstToken:
    """A processor of logits that changes nothing, and notes the highest probability at the first token."""

    probability = float("nan")

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if self.probability != self.probability:  # not seen yet
            self.probability = logits.detach().float().softmax(-1).max().item()
        return logits


def _image(picture: Picture) -> Any:
    from PIL import Image

    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _vision_tokens(chat: Chat, inputs: dict[str, Tensor]) -> int:
    ids = inputs["input_ids"]
    return int(torch.count_nonzero(anatomy(chat.model).vision_mask(ids, ids)))
