"""How a batch of questions is put to an attached model: by `generate` here, packed in packing.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tokenprune.engine.attach import Attached
from tokenprune.families.chat import Chat
from tokenprune.study.cases import Case

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Asked:
    """A batch of answers, and the prompts that they answer. Q questions."""

    answers: Tensor
    """``[Q, new]`` token ids."""
    input_ids: Tensor
    """``[Q, L]``."""
    attention_mask: Tensor
    """``[Q, L]`` 0 on padding."""


class Asker(Protocol):
    """One way to ask; both give the same answers."""

    @property
    def chat(self) -> Chat:
        """Model and processor."""
        ...

    @staticmethod
    def batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
        """Indices of `cases` in batches of at most `size`."""
        ...

    def ask(
        self, attached: Attached, cases: Sequence[Case], pictures: Sequence[Image] | None, max_new_tokens: int
    ) -> Asked:
        """Greedy answers to `cases`, with `pictures` (one for each case) in place of their own where given."""
        ...


@dataclass(frozen=True)
class GenerateAsker:
    """Asks by `model.generate`, each question with its own picture."""

    chat: Chat

    @staticmethod
    def batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
        """Batches of equal work: pictures of one size together, questions of similar length."""
        shapes: dict[str, tuple[int, int]] = {}
        for case in cases:
            if case.picture_id not in shapes:
                shapes[case.picture_id] = case.picture().size
        order = sorted(
            range(len(cases)), key=lambda i: (shapes[cases[i].picture_id], len(cases[i].question.split()), i)
        )
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def ask(
        self, attached: Attached, cases: Sequence[Case], pictures: Sequence[Image] | None, max_new_tokens: int
    ) -> Asked:
        """As `Asker.ask`."""
        shown = [case.picture() for case in cases] if pictures is None else pictures
        inputs = self.chat.batch([[picture] for picture in shown], [case.question for case in cases])
        return Asked(self.chat.generate(inputs, max_new_tokens), inputs["input_ids"], inputs["attention_mask"])
