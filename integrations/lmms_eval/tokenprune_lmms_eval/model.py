"""A model of lmms-eval: any family that tokenprune supports, with a recipe on it.

--model tokenprune --model_args pretrained=FOLDER,recipe=feather,keep=0.25
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

import tokenprune as tp
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.families.chat import Chat

KNOWN = {"max_new_tokens", "until", "do_sample", "temperature", "top_p", "num_beams"}


class Question(NamedTuple):
    """One request of lmms-eval."""

    text: str
    """Its prompt, by the model's chat template."""
    images: Sequence[Any]
    settings: dict[str, Any]


@contextmanager
def fatal() -> Iterator[None]:
    """End the process with exit code 1 on any error: lmms-eval logs an `Exception`, goes on, and exits with 0."""
    try:
        yield
    except TokenPruneError as error:
        raise SystemExit(f"tokenprune: {error}") from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


class Tokenprune(lmms):
    """Greedy answers to pictures and text, in batches; several processes by torchrun or accelerate.

    What is refused or goes wrong ends the run: it is never an empty answer, which would be scored as a wrong one.

    Args:
        pretrained: folder, hub id, or ``embedded``.
        recipe: name or path.
        keep: budget that replaces the recipe's, as in `tokenprune.attach`; `average` and `final` alike.
        average: see `keep`.
        final: see `keep`.
        batch_size: questions asked together.
        device: by default that of the process.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        recipe: str = "none",
        keep: float | None = None,
        average: float | None = None,
        final: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        with fatal():
            unknown = {
                key: value for key, value in unknown.items() if key not in ("max_batch_size",) and value is not None
            }
            if unknown:
                raise InputError(
                    f"model_args: unknown {', '.join(unknown)}; expected pretrained, recipe, keep, average, final"
                )
            self.accelerator = Accelerator(cpu=device == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            self.batch_size = int(batch_size)
            self.device = self.accelerator.device if device is None or self._world_size > 1 else device
            self.chat = Chat(str(pretrained), *tp.load(str(pretrained)))
            self.chat.model.to(self.device)
            self.attached = tp.attach(self.chat.model, recipe, keep=keep, average=average, final=final)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        with fatal():
            found: list[GenerationResult] = []
            questions = [self._question(*request.args) for request in requests]
            for _, alike in groupby(questions, key=lambda question: repr(question.settings)):
                same = list(alike)
                for at in range(0, len(same), self.batch_size):
                    found += self._answers(same[at : at + self.batch_size])
            return found

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise SystemExit("tokenprune answers questions; choose a task of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        raise SystemExit("tokenprune answers questions of one round")

    def _question(
        self, context: str, messages: Any, settings: dict[str, Any], doc: int, task: str, split: str
    ) -> Question:
        talk = ChatMessages(messages=messages(self.task_dict[task][split][doc]))
        images, videos, audios = talk.extract_media()
        if videos or audios:
            raise InputError(f"{task}: question {doc} has video or audio; expected pictures and text")
        if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1:
            raise InputError(f"{task}: asks for sampling or beams ({settings}); expected greedy answers")
        if unknown := settings.keys() - KNOWN:
            raise InputError(f"{task}: unknown generation settings {sorted(unknown)}; expected {sorted(KNOWN)}")
        text = self.chat.processor.apply_chat_template(
            talk.to_hf_messages(), add_generation_prompt=True, tokenize=False
        )
        return Question(str(text), images, settings)

    def _answers(self, questions: Sequence[Question]) -> list[GenerationResult]:
        settings = questions[0].settings
        inputs = self.chat.process([each.images for each in questions], [each.text for each in questions])
        found = []
        for ids in self.chat.generate(inputs, int(settings.get("max_new_tokens", 128))):
            text = self.chat.text(ids)
            stops = settings.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            found.append(GenerationResult(text=text.strip(), token_counts=TokenCounts(output_tokens=len(ids))))
        return found
