"""`Respondent`: a loaded model that answers what `evaluate` requests of it, in this process or another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenprune.engine.attach import attach
from tokenprune.errors import BudgetError, InputError, TokenPruneError
from tokenprune.families.chat import Chat
from tokenprune.study.cases import Case
from tokenprune.study.evaluate.askers import Asker, GenerateAsker
from tokenprune.study.evaluate.asking import ask, model_key
from tokenprune.study.evaluate.conditions import Condition
from tokenprune.study.evaluate.cost import Meter
from tokenprune.study.evaluate.journal import Batch
from tokenprune.study.evaluate.packing import PackedAsker

Response = Batch | Sequence[str] | None


class Respondent:
    """A model that answers requests, with what it remembers between them: its meter, and prompts that are packed.

    Args:
        chat: model and processor; nothing is attached to the model.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    @cached_property
    def run(self) -> str:
        """Key of the model, as `model_key` has it."""
        return model_key(self.chat)

    @property
    def facts(self) -> dict[str, Any]:
        """What its answers are told with."""
        model = self.chat.model
        return {"model": self.chat.name, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}

    @cached_property
    def meter(self) -> Meter:
        """Of the model."""
        return Meter(self.chat.model)

    @cached_property
    def packed(self) -> PackedAsker:
        """Asks the questions about a picture together."""
        return PackedAsker(self.chat)

    def asker(self, packed: bool) -> Asker:
        """How questions are put to the model."""
        return self.packed if packed else GenerateAsker(self.chat)

    def __call__(self, request: Request, /) -> Response:
        """What the request asks for."""
        return request.of(self)


class Request(ABC):
    """What a `Respondent` is asked for. Plain data: it travels to other processes."""

    @abstractmethod
    def of(self, respondent: Respondent) -> Response:
        """Do it."""


@dataclass(frozen=True)
class Ask(Request):
    """The answers to a batch of cases under a condition, and what they cost; see `ask`."""

    condition: Condition
    cases: Sequence[Case]
    totals: Sequence[int] | None
    shares: Sequence[float] | None
    packed: bool
    max_new_tokens: int

    def of(self, respondent: Respondent) -> Batch:
        """Answers and costs."""
        return ask(
            respondent.asker(self.packed),
            self.cases,
            self.condition,
            meter=respondent.meter,
            totals=self.totals,
            shares=self.shares,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True)
class UnknownWords(Request):
    """Words of the questions that the model's vocabulary does not hold, each once."""

    questions: Sequence[str]

    def of(self, respondent: Respondent) -> list[str]:
        """The words, in order."""
        return list(dict.fromkeys(word for each in self.questions for word in respondent.chat.unknown_words(each)))


@dataclass(frozen=True)
class Check(Request):
    """Whether all conditions fit the model, and its processor takes all cases; what does not is told at once."""

    cases: Sequence[Case]
    conditions: Sequence[Condition]
    packed: bool

    def of(self, respondent: Respondent) -> None:
        """Raise what is wrong."""
        _check_fit(respondent.chat.model, self.conditions)
        _ = respondent.meter
        _check_processor(respondent.chat, self.cases)
        respondent.asker(self.packed)


def _check_processor(chat: Chat, cases: Sequence[Case]) -> None:
    """Make every prompt, and show the processor a picture of each size: what it refuses ends nothing half-way."""
    problems: list[str] = []
    pictures: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for case in cases:
        try:
            prompt = chat.prompt(case.question, 1)
            if case.picture_id in pictures:
                continue
            pictures.add(case.picture_id)
            picture = case.picture()
            if picture.size not in taken:
                chat.process([[picture]], [prompt])
                taken.add(picture.size)
        except InputError as error:
            problems.append(f"{case.where or case.picture_id}: error: {error}")
    if problems:
        raise InputError("\n".join(problems))


def _check_fit(model: Any, conditions: Sequence[Condition]) -> None:
    """Put every recipe on the model and take it off again."""
    problems: dict[str, type[TokenPruneError]] = {}
    for condition in conditions:
        if condition.recipe is None:
            continue
        try:
            attach(model, condition.recipe).detach()
        except TokenPruneError as error:
            problems.setdefault(f"{condition.label}: {str(error).removeprefix(f'{condition.label}: ')}", type(error))
    if problems:
        kind = BudgetError if set(problems.values()) == {BudgetError} else InputError
        raise kind("\n".join(problems))
