"""What a fit teaches: the learned parts of a recipe's stages, or the request of one that asks again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from tokenprune.core.files import whole_file
from tokenprune.engine.attach import attach
from tokenprune.errors import InputError, RecipeError
from tokenprune.families.chat import Chat
from tokenprune.fitting.aims import objective
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.objectives import Prompts
from tokenprune.fitting.plan import Plan
from tokenprune.fitting.rewards import group_advantages
from tokenprune.fitting.written import learned_parts, write_request, write_weights
from tokenprune.parts.learned import Host, Learned
from tokenprune.parts.request import RequestHead
from tokenprune.recipe import Recipe
from tokenprune.study.cases import Box
from tokenprune.twice import both_inputs, last_state

if TYPE_CHECKING:
    from PIL.Image import Image

MADE_BY = "tokenprune fit"
CHUNK = 256
"""Questions whose answers lie in one file."""


class Asked(Protocol):
    """A picture and a question; the answer need not be known. `tokenprune.study.cases.Case` is one.

    With a ``target`` (`tokenprune.study.cases.Box`, or None), the aim ``boxes`` can learn from it.
    """

    @property
    def picture(self) -> Callable[[], Image]: ...
    @property
    def question(self) -> str: ...


def box_of(asked: Asked) -> Box | None:
    """Where the thing asked for is; None where the question does not tell."""
    return getattr(asked, "target", None)


def with_boxes(data: Sequence[Asked]) -> list[Asked]:
    """The questions with a box around what they ask for.

    Raises:
        InputError: none has one.
    """
    found = [asked for asked in data if box_of(asked) is not None]
    if not found:
        raise InputError(
            f"aim boxes: none of {len(data)} questions has a box around what it asks for (Case.target; box in a file "
            "of JSON lines); fit with --aim logits, which needs none"
        )
    return found


class Lesson(Protocol):
    """What a fit teaches."""

    parts: Mapping[str, Learned]
    """What learns, by name."""

    def prepare(self, asked: Sequence[Asked], folder: Path, told: Callable[[int, int], None] | None) -> Sequence[Any]:
        """What `loss` takes of each question; what is kept in `folder` for another call need not be done again."""
        ...

    def loss(self, prepared: Sequence[Any], generator: torch.Generator) -> Tensor:
        """A number with a gradient to the learned parts; what chance decides, `generator` decides."""
        ...

    def write(self, folder: Path) -> tuple[Path, tuple[Path, ...]]:
        """Write the weights and a recipe that names them, and tell their files."""
        ...


class StagesLesson:
    """Learned parts of stages: what the untouched model does is what they learn.

    Raises:
        RecipeError: the recipe has none.
    """

    def __init__(self, chat: Chat, recipe: Recipe, plan: Plan, host: Host) -> None:
        stages = fresh_stages(recipe, host, seed=plan.seed)
        self.parts: Mapping[str, Learned] = learned_parts(stages)
        if not self.parts:
            raise RecipeError(f"{recipe.name}: no part of it learns; `tokenprune ls parts` says which do")
        self._recipe, self._objective = recipe, objective(chat, stages, plan)

    def prepare(self, asked: Sequence[Asked], folder: Path, told: Callable[[int, int], None] | None) -> Sequence[Asked]:
        return asked

    def loss(self, prepared: Sequence[Asked], generator: torch.Generator) -> Tensor:
        pictures, questions = [each.picture() for each in prepared], [each.question for each in prepared]
        return self._objective.loss(Prompts(pictures, questions, [*map(box_of, prepared)]), generator)

    def write(self, folder: Path) -> tuple[Path, tuple[Path, ...]]:
        return write_weights(self._recipe, self.parts, folder, made_by=MADE_BY)


@dataclass(frozen=True, eq=False)
class Known:
    """All that a reward needs to know of one question: the model is frozen and greedy, so nothing else can happen."""

    state: Tensor
    """``[D]`` what a `RequestHead` reads of the first pass."""
    first: bool
    """Whether the answer of the first pass is right."""
    full: bool
    """Whether that of the full pass is."""


class RequestLesson:
    """The request of a recipe that asks again, taught by policy gradient.

    Of each question, every rollout answers directly or asks for the full picture, as the head's probability has it, and
    is rewarded; what did better than the other rollouts of its question becomes more probable. Each step draws rollouts
    anew, so no ratio of policies needs clipping.

    Both answers of a question are asked for once and kept in the folder, so the steps themselves take no forward.

    Raises:
        InputError: rewards by labels, and questions without; or smaller pictures save nothing on this model.
    """

    def __init__(self, chat: Chat, recipe: Recipe, plan: Plan, host: Host, data: Sequence[Asked] = ()) -> None:
        if plan.rewards.right == "labels" and not all(hasattr(each, "right") for each in data):
            raise InputError(
                "rewards by labels need questions that know their answer (`right`), as cases have; "
                "Rewards(right='untouched') needs none"
            )
        for each in data[:1]:  # what is refused for one is refused before anything is written
            both_inputs(chat, [[each.picture()]], [each.question], recipe)
        self._chat, self._recipe, self._plan = chat, recipe, plan
        self._head = RequestHead().start(host, seed=plan.seed)
        self.parts: Mapping[str, Learned] = {"request": self._head}

    def prepare(self, asked: Sequence[Asked], folder: Path, told: Callable[[int, int], None] | None) -> Sequence[Known]:
        known: list[Known] = []
        for start in range(0, len(asked), CHUNK):
            known += self._chunk(asked[start : start + CHUNK], folder / f"answers-{start // CHUNK}.safetensors")
            if told is not None:
                told(len(known), len(asked))
        return known

    def _chunk(self, asked: Sequence[Asked], file: Path) -> Iterator[Known]:
        if not file.exists():
            data = save(self._answers(asked))
            with whole_file(file) as copy:
                copy.write(data)
        try:
            made = load(file.read_bytes())
            states, right = made["states"], made["right"]
            if len(states) != len(asked) or right.shape != (len(asked), 2):
                raise ValueError
        except (OSError, ValueError, KeyError, SafetensorError):
            raise InputError(f"{file} is not what a fit leaves: choose another folder, or empty it") from None
        states = states.to(self._chat.model.device)
        return (Known(state, *told) for state, told in zip(states, right.tolist(), strict=True))

    def _answers(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """``states`` [N, D] of first passes, and ``right`` [N, 2]: whether the first and the full answer is."""
        states: list[Tensor] = []
        right: list[tuple[bool, bool]] = []
        for start in range(0, len(asked), self._plan.batch):
            batch = asked[start : start + self._plan.batch]
            first, full = both_inputs(
                self._chat, [[each.picture()] for each in batch], [each.question for each in batch], self._recipe
            )
            with attach(self._chat.model, self._recipe.first_pass), last_state(self._chat.model) as state:
                cheap = self._texts(first)
            states.append(state().float().cpu())
            right += [self._right(*row) for row in zip(batch, cheap, self._texts(full), strict=True)]
        return {"states": torch.cat(states), "right": torch.tensor(right)}

    def _texts(self, inputs: dict[str, Tensor]) -> list[str]:
        return [self._chat.text(ids) for ids in self._chat.generate(inputs, self._plan.answer_tokens)]

    def _right(self, asked: Any, first: str, full: str) -> tuple[bool, bool]:
        if self._plan.rewards.right == "untouched":
            return first == full, True
        return bool(asked.right(first)), bool(asked.right(full))

    def loss(self, prepared: Sequence[Known], generator: torch.Generator) -> Tensor:
        odds = self._head(torch.stack([each.state for each in prepared]))
        first, full = (
            torch.tensor([getattr(each, name) for each in prepared], device=odds.device)[:, None]
            for name in ("first", "full")
        )
        chance = torch.rand(len(prepared), self._plan.rewards.rollouts, generator=generator).to(odds.device)
        asks = chance < odds.detach().sigmoid()[:, None]
        rewards = self._plan.rewards.of(torch.where(asks, full, first), asks)
        said = functional.logsigmoid(torch.where(asks, odds[:, None], -odds[:, None]))
        gain = (group_advantages(rewards) * said).mean()
        # The value is what rewards are short of 1, which a reader can follow; the gradient is that of the policy.
        return 1 - rewards.mean() - gain + gain.detach()

    def write(self, folder: Path) -> tuple[Path, tuple[Path, ...]]:
        return write_request(self._recipe, self._head, folder, made_by=MADE_BY)


def lesson(chat: Chat, recipe: Recipe, plan: Plan, host: Host, data: Sequence[Asked]) -> Lesson:
    """What a plan's aim teaches of a recipe.

    Raises:
        RecipeError: the recipe has nothing to learn.
        InputError: rewards are for a recipe that asks again, and for that alone; or `data` has no rewards.
    """
    if (recipe.again is not None) != (plan.aim == "reward"):
        if recipe.again is None:
            raise InputError(f"{recipe.name} does not ask again, so there is no request to reward; leave the aim out")
        raise InputError(
            f"{recipe.name} asks again (`again`): what learns there is its request, with the aim reward, not "
            f"{plan.aim}; stages of a first pass are fitted in a recipe without `again`"
        )
    return (
        StagesLesson(chat, recipe, plan, host)
        if recipe.again is None
        else RequestLesson(chat, recipe, plan, host, data)
    )
