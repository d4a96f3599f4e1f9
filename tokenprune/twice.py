"""Asking twice: a cheap first pass, and one with everything where its answer is not sure (`Again`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenprune.engine.attach import attach
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.evaluate.conditions import shrink
from tokenprune.study.evaluate.cost import Meter

if TYPE_CHECKING:
    from tokenprune.core.pictures import Picture
    from tokenprune.core.report import Report
    from tokenprune.families.chat import Chat
    from tokenprune.parts.request import RequestHead


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
    asks: float | None = None
    """Probability of the learned request; None where there is none, and of a pass that nothing comes behind."""


def ask_twice(
    chat: Chat, pictures: Sequence[Picture], question: str, recipe: Recipe, max_new_tokens: int
) -> tuple[Pass, ...]:
    """The first pass of a recipe with `again`, and the full one where that is not sure; the last one has answered.

    Raises:
        InputError: smaller pictures have as many vision tokens as full ones on this model.
    """
    again, head = recipe.again, recipe.build_request()
    assert again is not None, "nothing says when to ask again"
    if head is not None:
        head.to(chat.model.device).check_host(host_of(anatomy(chat.model)))
    first, full = both_inputs(chat, [pictures], [question], recipe)
    one = one_pass(chat, first, recipe.first_pass, "first", max_new_tokens, head)
    if not again.unsure(one.text, one.probability, one.asks):
        return (one,)
    return one, full_pass(chat, full, max_new_tokens)


def both_inputs(
    chat: Chat, pictures: Sequence[Sequence[Picture]], questions: Sequence[str], recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model inputs of a batch for the first pass and for the full one.

    Raises:
        InputError: smaller pictures have as many vision tokens as full ones on this model.
    """
    assert recipe.again is not None, "nothing says when to ask again"
    pixels = recipe.again.pixels
    full = chat.batch(pictures, questions)
    if pixels == 1:
        return full, full
    first = chat.batch([[shrink(_image(each), pixels)[0] for each in own] for own in pictures], questions)
    for small, large in zip(_vision_tokens(chat, first), _vision_tokens(chat, full), strict=True):
        if small >= large:
            other = "; give pixels 1.0 and keep 0.25 to pool tokens instead (the variant `pooled` of visionthink)"
            raise InputError(
                f"{recipe.name}: with again.pixels {pixels} this prompt has {small} vision tokens, with full "
                f"pictures {large}: the model's tower sees both at one size, so a smaller picture saves nothing{other}"
            )
    return first, full


def full_pass(chat: Chat, inputs: dict[str, Tensor], max_new_tokens: int) -> Pass:
    """An answer with all vision tokens."""
    return one_pass(chat, inputs, load_recipe("none"), "full", max_new_tokens)


def one_pass(
    chat: Chat,
    inputs: dict[str, Tensor],
    recipe: Recipe,
    name: Literal["first", "full"],
    max_new_tokens: int,
    head: RequestHead | None = None,
) -> Pass:
    """An answer under one recipe, with how sure it is, what its prefill cost, and what a learned request says to it."""
    first = _FirstToken()
    with attach(chat.model, recipe) as attached, last_state(chat.model) as state:
        (ids,) = chat.generate(inputs, max_new_tokens, logits_processor=[first])
    asks = None
    if head is not None:
        with torch.inference_mode():
            asks = head(state()).sigmoid().item()
    try:
        (cost,) = Meter(chat.model).prefills(recipe, attached.report, inputs["input_ids"], inputs["attention_mask"])
    except (InputError, UnsupportedModelError):
        return Pass(name, chat.text(ids), first.probability, None, attached.report, asks)
    cost += 0 if head is None else head.products
    return Pass(name, chat.text(ids), first.probability, cost, attached.report, asks)


@contextmanager
def last_state(model: Any) -> Iterator[Callable[[], Tensor]]:
    """Within the block, what the output layer reads first is noted: ``[B, D]`` at the last position of each prompt.

    Called behind the block, what is yielded tells it, as a tensor that autograd may save.
    """
    noted: list[Tensor] = []

    def note(module: Any, given: tuple[Tensor, ...]) -> None:
        if not noted:
            noted.append(given[0][:, -1].detach())

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield lambda: noted[0].clone()
    finally:
        handle.remove()


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


def _vision_tokens(chat: Chat, inputs: dict[str, Tensor]) -> list[int]:
    """How many each prompt has."""
    ids = inputs["input_ids"]
    counts: list[int] = anatomy(chat.model).vision_mask(ids, ids).sum(1).tolist()
    return counts
