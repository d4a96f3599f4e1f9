"""`load` and `ask`: a model with its processor by name, and an answer about pictures with what ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.core.clip import Clip
from tokenprune.core.pictures import as_pictures
from tokenprune.core.report import Report
from tokenprune.errors import InputError
from tokenprune.families import load as from_name
from tokenprune.families.chat import Chat
from tokenprune.families.load import EMBEDDED

if TYPE_CHECKING:
    from tokenprune.core.pictures import Shown
    from tokenprune.families.load import Kernel
    from tokenprune.recipe import Recipe
    from tokenprune.twice import Pass


@dataclass(frozen=True)
class Answer:
    """An answer, and what ran to get it."""

    text: str
    report: Report | None
    """Vision tokens that entered each layer, and those that each stage kept; None where no recipe was asked for."""
    passes: tuple[Pass, ...] = ()
    """Of a recipe that may ask again: each pass with its answer and cost. The last one has answered."""

    def __str__(self) -> str:
        return self.text


def load(
    name: str = EMBEDDED, *, dtype: str | None = None, device: str | None = None, attention: Kernel = "sdpa"
) -> Chat:
    """A model and its processor, as the command line loads them: ``model, processor = tp.load("embedded")``.

    Only what pictures need is loaded: torchvision, which some processors ask for because of videos, is not.

    Args:
        name: ``embedded`` for the tiny model that comes with the package, a folder, or a hub id (``owner/name``).
        dtype: ``float32``, ``bfloat16`` or ``float16``; float32 on a CPU, and for the embedded model, and the
            checkpoint's own elsewhere when left out.
        device: as in `torch.device`; the CPU for the embedded model and a GPU, if there is one, for others when left
            out.
        attention: ``sdpa`` or ``eager``.

    Raises:
        InputError: no such model, dtype or device.
        UnsupportedModelError: a model of no supported family, told before its weights are read.
    """
    if name != EMBEDDED:
        return from_name.load(name, dtype=dtype, device=device, attention=attention, also=(EMBEDDED,))
    import torch

    from tokenprune.scenes import load_embedded

    kind, where = from_name.dtype_named(dtype) or torch.float32, from_name.device_named(device or "cpu")
    from_name.quiet()
    network, processor = load_embedded()
    network.set_attn_implementation(attention)
    return Chat(name, network.to(where, kind), processor)


def ask(
    model: Any,
    processor: Any,
    pictures: Shown | Clip | Sequence[Shown | Clip],
    question: str,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = "sparsevlm",
    *,
    max_new_tokens: int = 64,
    keep: float | None = None,
    average: float | None = None,
    final: float | None = None,
    flops: float | None = None,
) -> Answer:
    """Ask a model about pictures, with fewer vision tokens.

        model, processor = tp.load("llava-hf/llava-1.5-7b-hf")
        answer = tp.ask(model, processor, "cat.jpg", "What is on the table?", "fastv", keep=0.25)
        print(answer, answer.report)

    Args:
        model: a supported model with nothing attached; left as it was.
        processor: that speaks to it.
        pictures: one or several, as files, Pillow images or arrays ``[H, W, 3]``. A video is a picture, too, for
            families that take it: ``tp.open_video("clip.mp4", frames=8)``. Videos stand before pictures.
        question: about them.
        recipe: a recipe's name, path, dict or `Recipe`; None asks with all vision tokens. One that may ask again
            (``visionthink``) is asked so, and tells its `passes`.
        max_new_tokens: longest answer.
        keep: budget that replaces the recipe's, as in `attach`; so `average`, `final` and `flops`.

    Raises:
        InputError: no question, a file that is no picture, or a video for a model that takes none.
        RecipeError, BudgetError, UnsupportedModelError: as in `attach`.
    """
    from tokenprune.engine.attach import attach  # brings transformers, which this module's names do not need
    from tokenprune.recipe import load_recipe

    if not question.strip():
        raise InputError("ask: the question is empty")
    given = pictures if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
    shown = [each if isinstance(each, Clip) else as_pictures(each)[0] for each in given]
    chat = Chat("", model, processor)
    inputs = chat.inputs(shown, question)
    if recipe is None:
        if any(value is not None for value in (keep, average, final, flops)):
            raise InputError("ask: a budget needs a recipe")
        return Answer(chat.text(chat.generate(inputs, max_new_tokens)[0]), None)
    resolved = load_recipe(recipe, keep=keep, average=average, final=final, flops=flops)
    if resolved.again is not None:
        from tokenprune.twice import ask_twice

        still = [each for each in shown if not isinstance(each, Clip)]
        if len(still) < len(shown):
            raise InputError(f"ask: {resolved.name} may ask again about larger pictures; it takes no video")
        passes = ask_twice(chat, still, question, resolved, max_new_tokens)
        return Answer(passes[-1].text, passes[-1].report, passes)
    with attach(model, resolved) as attached:
        (ids,) = chat.generate(inputs, max_new_tokens)
    return Answer(chat.text(ids), attached.report)
