"""Questions about a picture asked together: each picture once, the questions about it behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from tokenprune.engine.attach import Attached
from tokenprune.engine.packed.generate import check_packable, generate_packed, shares_caches
from tokenprune.engine.packed.prompt import PackedPrompt, pack
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.study.cases import Case
from tokenprune.study.evaluate.askers import Asked, GenerateAsker

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.families.chat import Chat

KEPT_BYTES = 512 * 2**20


class PackedAsker:
    """Asks the questions about a picture together, with what they share run once (`tokenprune.engine.packed`).

    It keeps the prompts of unchanged pictures, since every condition asks them again. A recipe whose questions cannot
    share the caches of their picture (``kv: all_layers``) is asked by `generate`, in the same batches.

    Args:
        chat: model and processor.
        kept_bytes: vision features and pixels that are held at most; prompts beyond are made anew each time.

    Raises:
        UnsupportedModelError: questions to this model cannot share a picture; the message says why.
    """

    def __init__(self, chat: Chat, *, kept_bytes: int = KEPT_BYTES) -> None:
        check_packable(chat.model)
        self.chat = chat
        self._left = kept_bytes
        self._kept: dict[tuple[str, ...], PackedPrompt] = {}

    @staticmethod
    def batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
        """Batches in order; a picture is not split unless it alone has more than `size` questions."""
        of: dict[str, list[int]] = {}
        for index, case in enumerate(cases):
            of.setdefault(case.picture_id, []).append(index)
        batch: list[int] = []
        for indices in of.values():
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                if len(batch) + len(part) > size:
                    yield batch
                    batch = []
                batch = batch + part
        if batch:
            yield batch

    def ask(
        self, attached: Attached, cases: Sequence[Case], pictures: Sequence[Image] | None, max_new_tokens: int
    ) -> Asked:
        """As `Asker.ask`."""
        if not shares_caches(attached):
            return GenerateAsker(self.chat).ask(attached, cases, pictures, max_new_tokens)
        prompt = self.prompt(cases, pictures)
        answers = generate_packed(attached, prompt, max_new_tokens=max_new_tokens)
        return Asked(answers, prompt.input_ids, prompt.attention_mask)

    def prompt(self, cases: Sequence[Case], pictures: Sequence[Image] | None = None) -> PackedPrompt:
        """The packed prompt of `cases`.

        Args:
            cases: the batch.
            pictures: one for each case instead of its own, the same for cases about one picture.
        """
        key = tuple(case.key for case in cases)
        if pictures is None and key in self._kept:
            return self._kept[key]
        made = self._make(cases, [case.picture() for case in cases] if pictures is None else pictures)
        size = sum(held.numel() * held.element_size() for held in (made.prefix, *made.pixels.values()))
        if pictures is None and size <= self._left:
            self._left -= size
            self._kept[key] = made
        return made

    def _make(self, cases: Sequence[Case], pictures: Sequence[Image]) -> PackedPrompt:
        chat, model = self.chat, self.chat.model
        first: dict[str, int] = {}
        for index, case in enumerate(cases):
            first.setdefault(case.picture_id, index)
        owners = {picture_id: number for number, picture_id in enumerate(first)}
        texts = [chat.prompt(case.question, 1) for case in cases]
        owned = list(first.values())
        made = chat.process(
            [[pictures[index]] for index in owned], [texts[index] for index in owned], padding_side="right"
        )
        image = anatomy(model).base.config.image_token_id
        rows = [_cut(ids, image) for ids in chat.tokenizer(texts, **chat.token_arguments(texts))["input_ids"]]
        whole = made["input_ids"]
        head, count = rows[0][0], int((whole[0] == image).sum())
        prefix = [*head, *[image] * count]
        for number, index in enumerate(first.values()):
            told = [*prefix, *rows[index][1]]
            if rows[index][0] != head or whole[number, : len(told)].tolist() != told:
                raise UnsupportedModelError("packed: the processor changes the text around a picture; ask by generate")
        pixels = {
            key: value for key, value in made.items() if key not in ("input_ids", "attention_mask", "token_type_ids")
        }
        prefix_ids = torch.tensor([prefix] * len(first), device=model.device)
        return pack(model, pixels, prefix_ids, [row[1] for row in rows], [owners[case.picture_id] for case in cases])


def _cut(ids: Sequence[int], image: int) -> tuple[list[int], list[int]]:
    """What stands before and behind the one placeholder of a prompt."""
    if list(ids).count(image) != 1 or ids[-1] == image:
        raise UnsupportedModelError("packed: expected a prompt with one picture before its question; ask by generate")
    at = list(ids).index(image)
    return list(ids[:at]), list(ids[at + 1 :])
