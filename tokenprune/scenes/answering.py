"""Answers of the embedded model, or of another LLaVA, to questions about pictures, many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

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
    remaining, answers = iter(pairs), []
    while batch := list(islice(remaining, batch_size)):
        answers += _answer_batch(model, processor, batch)
    return answers


def _answer_batch(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch: Sequence[tuple[Picture, str]]
) -> list[str]:
    inputs = processor(
        images=[picture for picture, _ in batch],
        text=[prompt(processor, question) for _, question in batch],
        padding=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    output = model.generate(**inputs, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
