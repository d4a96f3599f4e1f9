"""`audit`: the prefills of an audit, over any pictures, or over held-out scenes of the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenprune.engine.attach import attach
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.audit.collect import Audit, Box, third_of
from tokenprune.study.audit.heads import HeadAudit
from tokenprune.study.audit.stages import THIRDS
from tokenprune.study.statistics import Estimate, proportion

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.families.chat import Chat
    from tokenprune.scenes import Question

Done = Callable[[int], None]


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

    what: str
    """``scenes`` or ``pictures``."""
    heads: HeadAudit
    audit: Audit = field(default_factory=Audit)
    thirds: dict[str, Tally] = field(default_factory=dict)
    """By the third of the picture that the target's centre lies in, and ``all``; empty without known targets."""


def audit_scenes(chat: Chat, recipe: Recipe, scenes: int, batch_size: int, done: Done) -> Survey:
    """Ask the embedded model where things are in the first `scenes` held-out scenes that can be asked about."""
    from tokenprune.scenes.answering import answer
    from tokenprune.scenes.world.generate import UNITS

    survey = Survey("scenes", HeadAudit(chat.model, recipe), thirds={name: Tally() for name in ("all", *THIRDS)})
    asked = islice(_localisation(), scenes)
    while batch := list(islice(asked, batch_size)):
        pairs = [(image, question.question) for image, question in batch]
        with survey.heads.listening():
            untouched = answer(chat.model, chat.processor, pairs, batch_size=batch_size)
        with attach(chat.model, recipe) as attached:
            reduced = answer(chat.model, chat.processor, pairs, batch_size=batch_size)
        boxes = [_box(question, UNITS) for _, question in batch]
        survey.audit.add(attached.report, boxes)
        for (_, question), box, before, after in zip(batch, boxes, untouched, reduced, strict=True):
            for tally in (survey.thirds["all"], survey.thirds[THIRDS[third_of(box)]]):
                tally.targets += 1
                tally.untouched += before == question.answer
                tally.reduced += after == question.answer
        done(len(batch))
    return survey


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
    survey = Survey("pictures", HeadAudit(chat.model, loaded))
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


def _localisation() -> Iterator[tuple[Any, Question]]:
    """Held-out scenes in order, with one question each that asks where something is."""
    from itertools import count

    from tokenprune.scenes import make_scene

    for number in count():
        scene = make_scene(number)
        for question in scene.questions:
            if question.task == "localisation":
                yield scene.image, question


def _box(question: Question, units: float) -> Box:
    assert question.box is not None  # a localisation question has a target
    left, top, right, bottom = question.box
    return left / units, top / units, right / units, bottom / units
