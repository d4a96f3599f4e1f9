"""The prefills of an audit: `audit` asks one question about all pictures, `audit_cases` asks cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from tokenprune.engine.attach import attach
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.audit.collect import Audit, third_of
from tokenprune.study.audit.heads import HeadAudit
from tokenprune.study.audit.stages import THIRDS
from tokenprune.study.cases import Case
from tokenprune.study.statistics import Estimate, proportion

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.families.chat import Chat


@dataclass
class Tally:
    """Right answers about targets of one third of the picture, of both sides."""

    targets: int = 0
    untouched: int = 0
    reduced: int = 0

    def accuracy(self, side: str) -> Estimate | None:
        """Of ``untouched`` or ``reduced``; None without targets."""
        return proportion(getattr(self, side), self.targets) if self.targets else None


@dataclass
class Survey:
    """Result of an audit: where tokens were kept, what attention follows, and which answers were right."""

    heads: HeadAudit
    audit: Audit = field(default_factory=Audit)
    thirds: dict[str, Tally] = field(default_factory=dict)
    """By the third of the picture that the target's centre lies in, and ``all``; empty without known targets."""


def audit(
    chat: Chat,
    recipe: Recipe | str,
    pictures: Iterable[Image],
    question: str,
    *,
    on_picture: Callable[[int], None] | None = None,
) -> Survey:
    """Where in the pictures a recipe keeps tokens, when `question` is asked about each.

        survey = tp.audit(tp.load("llava-hf/llava-1.5-7b-hf"), "fastv", pictures, "What is this?")
        print(survey.audit.stages[0].rows.mean)

    Only prefills run to their end: one untouched, which tells how much attention follows position in every layer, and
    one reduced.

    Args:
        chat: model and processor, from `load`.
        recipe: a recipe, or what `load_recipe` takes.
        pictures: opened one at a time.
        question: asked about each.
        on_picture: called with 1 behind every picture, for a progress bar.

    Raises:
        RecipeError, UnsupportedModelError: the recipe is not valid, or does not fit the model.
    """
    loaded = load_recipe(recipe)
    survey = Survey(HeadAudit(chat.model, loaded))
    for picture in pictures:
        inputs = chat.inputs([picture], question)
        if survey.heads:
            with survey.heads.listening():
                chat.generate(inputs, 1)
        with attach(chat.model, loaded) as attached:
            chat.generate(inputs, 1)
        survey.audit.add(attached.report)
        if on_picture is not None:
            on_picture(1)
    return survey


def audit_cases(
    chat: Chat,
    recipe: Recipe | str,
    cases: Iterable[Case],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    on_picture: Callable[[int], None] | None = None,
) -> Survey:
    """An audit over cases: it also tells how many tokens of their targets are kept, and how many answers stay right.

    Args:
        chat: model and processor, from `load`.
        recipe: a recipe, or what `load_recipe` takes.
        cases: read one batch at a time; the prefill of one without a `target` counts, its answer does not.
        batch_size: questions at a time.
        max_new_tokens: longest answer, in tokens.
        on_picture: called behind every batch with the number of its questions, for a progress bar.

    Raises:
        RecipeError, UnsupportedModelError: the recipe is not valid, or does not fit the model.
        InputError: a target outside of the picture.
    """
    loaded = load_recipe(recipe)
    survey = Survey(HeadAudit(chat.model, loaded), thirds={name: Tally() for name in ("all", *THIRDS)})
    remaining = iter(cases)
    while batch := list(islice(remaining, batch_size)):
        inputs = chat.batch([[case.picture()] for case in batch], [case.question for case in batch])
        with survey.heads.listening():
            untouched = chat.generate(inputs, max_new_tokens)
        with attach(chat.model, loaded) as attached:
            reduced = chat.generate(inputs, max_new_tokens)
        survey.audit.add(attached.report, [case.target for case in batch])
        for case, before, after in zip(batch, untouched, reduced, strict=True):
            if case.target is None:
                continue
            for tally in (survey.thirds["all"], survey.thirds[THIRDS[third_of(case.target)]]):
                tally.targets += 1
                tally.untouched += case.right(chat.text(before))
                tally.reduced += case.right(chat.text(after))
        if on_picture is not None:
            on_picture(len(batch))
    return survey
