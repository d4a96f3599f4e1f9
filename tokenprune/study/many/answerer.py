"""`Answerer`: a model with a recipe that answers batches of questions, and tells what that took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tokenprune.core.pictures import open_picture
from tokenprune.engine.attach import attach
from tokenprune.errors import InputError
from tokenprune.study.bench.clock import wait
from tokenprune.study.evaluate.asking import model_key
from tokenprune.study.many.batches import digest

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe
    from tokenprune.study.many.batches import Batch, Line


@dataclass(frozen=True)
class Measured:
    """A batch that was also asked with all vision tokens."""

    seconds: float
    """With the recipe, warm."""
    untouched_seconds: float
    answers: int
    same: int
    """Of `answers`, those that are the untouched model's to the letter."""


@dataclass(frozen=True)
class Done:
    """A batch that was answered. Plain data: it comes from other processes."""

    told: list[dict[str, Any]]
    """What the answers file says of each question: its answer and its vision tokens, or why it was refused."""
    seconds: float
    measured: Measured | None = None


class Answerer:
    """Answers batches of questions, greedily, with the recipe attached for each batch.

    Args:
        chat: model and processor; nothing is attached to the model.
        recipe: what is attached.
        max_new_tokens: longest answer, in tokens.

    Raises:
        TokenPruneError: the recipe does not fit the model.
    """

    def __init__(self, chat: Chat, recipe: Recipe, max_new_tokens: int) -> None:
        self.chat, self.recipe, self.max_new_tokens = chat, recipe, max_new_tokens
        attach(chat.model, recipe).detach()
        words = f"{model_key(chat)} {recipe.fingerprint} {max_new_tokens}"
        self.run = sha256(words.encode()).hexdigest()[:12]
        """Key of all that an answer depends on, beside picture and question."""
        self.facts = {
            "dtype": str(chat.model.dtype).removeprefix("torch."),
            "device": str(chat.model.device),
            "attention": chat.model.config._attn_implementation,
        }

    def __call__(self, batch: Batch) -> Done:
        """Answers to a batch; where the processor refuses a picture or a question, the others are asked one by one.

        Raises:
            InputError: a picture is not the file that the question was written about.
        """
        lines, measure = batch
        check_same(lines)
        start = time.perf_counter()
        pictures = [[open_picture(line.path, "--images")] for line in lines]
        try:
            inputs = self.chat.batch(pictures, [line.question for line in lines])
        except InputError as error:
            if len(lines) == 1:
                return Done([{"error": str(error)}], 0.0)
            alone = [self(([line], False)) for line in lines]
            return Done([told for each in alone for told in each.told], sum(each.seconds for each in alone))
        prepared = time.perf_counter() - start
        if measure:
            self._generate(inputs, 1)
        start = time.perf_counter()
        with attach(self.chat.model, self.recipe) as attached:
            answers = self._generate(inputs, self.max_new_tokens)
        seconds = time.perf_counter() - start
        report = attached.report
        average, final = report.vision_tokens.double().mean(1).tolist(), report.vision_tokens[:, -1].tolist()
        told = [
            {"answer": answer, "vision_tokens": total, "average": layers, "final": last}
            for answer, total, layers, last in zip(answers, report.total, average, final, strict=True)
        ]
        return Done(told, prepared + seconds, self._untouched(inputs, answers, prepared, seconds) if measure else None)

    def _untouched(self, inputs: dict[str, Any], answers: list[str], prepared: float, seconds: float) -> Measured:
        start = time.perf_counter()
        whole = self._generate(inputs, self.max_new_tokens)
        took = time.perf_counter() - start
        same = sum(one == other for one, other in zip(answers, whole, strict=True))
        return Measured(prepared + seconds, prepared + took, len(answers), same)

    def _generate(self, inputs: dict[str, Any], most: int) -> list[str]:
        answers = [self.chat.text(row) for row in self.chat.generate(inputs, most)]
        wait(self.chat.model.device)
        return answers


def check_same(lines: Sequence[Line]) -> None:
    """Raise `InputError` unless the pictures are still, and here, the files that the questions were written about."""
    for line in lines:
        try:
            same = digest(line.path) == line.digest
        except OSError as error:
            told = f"{line.path} cannot be read by a worker ({error.strerror})"
            raise InputError(f"{told}; are the pictures on a disk that all machines share?") from None
        if not same:
            raise InputError(f"{line.path} is another file where a worker runs, or has changed since")
