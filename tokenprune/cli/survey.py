"""Prefills for an audit: over held-out scenes of the embedded model, or over a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.pictures import open_picture
from tokenprune.engine.attach import attach
from tokenprune.errors import InputError
from tokenprune.study.audit import THIRDS, Audit, Box, Estimate, proportion
from tokenprune.study.audit.heads import HeadAudit

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe
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
    """What came out of all prefills."""

    what: str
    """``scenes`` or ``pictures``."""
    heads: HeadAudit
    audit: Audit = field(default_factory=Audit)
    thirds: dict[str, Tally] = field(default_factory=dict)
    """By the third of the picture that the target's centre lies in, and ``all``; empty without known targets."""


def of_scenes(chat: Chat, recipe: Recipe, scenes: int, batch_size: int, done: Done) -> Survey:
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
        for (_, question), box, *answers in zip(batch, boxes, untouched, reduced, strict=True):
            for tally in (survey.thirds["all"], survey.thirds[THIRDS[min(int(3 * (box[1] + box[3]) / 2), 2)]]):
                tally.targets += 1
                tally.untouched += answers[0] == question.answer
                tally.reduced += answers[1] == question.answer
        done(len(batch))
    return survey


def of_pictures(chat: Chat, recipe: Recipe, paths: Sequence[Path], question: str, done: Done) -> Survey:
    """Ask `question` about each picture; only the prefill runs to its end, once untouched and once reduced.

    Raises:
        InputError: a file that is no picture.
    """
    survey = Survey("pictures", HeadAudit(chat.model, recipe))
    for path in paths:
        try:
            picture = open_picture(path)
        except InputError as error:
            raise InputError(str(error).replace("--image:", "--images:", 1)) from None
        inputs = chat.inputs([picture], question)
        if survey.heads:
            with survey.heads.listening():
                chat.generate(inputs, 1)
        with attach(chat.model, recipe) as attached:
            chat.generate(inputs, 1)
        survey.audit.add(attached.report)
        done(1)
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
