"""Answers of the embedded model, or of another LLaVA, to questions about pictures, many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from tokenprune.families.chat import Chat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    Picture = NDArray[np.uint8] | Image.Image


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The text of one question about one picture, as the chat template writes it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: Iterable[tuple[Picture, str]],
    *,
    batch_size: int = 32,
) -> list[str]:
    """Greedy answers to (picture, question) pairs; pictures are arrays `[H, W, 3]` or Pillow images of any size."""
    chat = Chat("embedded", model, processor)
    remaining, answers = iter(pairs), []
    while batch := list(islice(remaining, batch_size)):
        answers += _answer_batch(chat, batch)
    return answers


def _answer_batch(chat: Chat, batch: Sequence[tuple[Picture, str]]) -> list[str]:
    inputs = chat.batch([[picture] for picture, _ in batch], [question for _, question in batch])
    answers = chat.generate(inputs, chat.model.generation_config.max_new_tokens)
    return [chat.text(row) for row in answers]
