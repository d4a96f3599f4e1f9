"""`Chat`: what a processor makes of pictures and questions, and the answers of whole batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenprune.families.chat import Chat, end_tokens, to_model
from tokenprune.scenes import load_embedded, make_scene

QUESTIONS = ("what colour is the star ?", "is there a red circle ?")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat("embedded", *load_embedded())


def model_with(eos: int | list[int] | None, pad: int | None) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos, pad_token_id=pad))


def test_a_prompt_has_one_first_token(chat: Chat) -> None:
    """Whether the chat template writes it or leaves it to the tokenizer."""
    text, picture = chat.prompt(QUESTIONS[0], 1), [[make_scene(0).image]]
    start = chat.tokenizer.bos_token
    assert not text.startswith(start)
    left, written = (chat.process(picture, [each])["input_ids"] for each in (text, start + text))
    assert (left == chat.tokenizer.bos_token_id).sum() == 1
    assert torch.equal(left, written)


def test_a_batch_is_padded_on_the_left_and_answers_as_its_prompts_do_alone(chat: Chat) -> None:
    images = [[make_scene(number).image] for number in (0, 1)]
    questions = (QUESTIONS[0], QUESTIONS[1] + " is there a red circle ?")
    inputs = chat.batch(images, questions)
    mask = inputs["attention_mask"]
    assert mask[:, -1].all() and sorted(mask[:, 0].tolist()) == [0, 1]
    answers = chat.generate(inputs, 8)
    assert answers.shape[0] == 2
    for row, own, question in zip(answers, images, questions, strict=True):
        assert chat.text(row) == chat.text(chat.generate(chat.inputs(own, question), 8)[0])


def test_a_batch_has_a_question_for_each_sample(chat: Chat) -> None:
    with pytest.raises(ValueError, match="zip"):
        chat.batch([[make_scene(0).image]], QUESTIONS)


def test_prompts_can_be_padded_on_the_right(chat: Chat) -> None:
    texts = [chat.prompt(question, 1) for question in ("is there a red circle ?", "is there a red red red circle ?")]
    made = chat.process([[make_scene(0).image]] * 2, texts, padding_side="right")
    assert made["attention_mask"][:, 0].all() and sorted(made["attention_mask"][:, -1].tolist()) == [0, 1]


def test_only_real_numbers_get_the_dtype_of_the_model() -> None:
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    made = {"input_ids": torch.ones(1, 2, dtype=torch.long), "pixel_values": torch.ones(1), "names": ["a"]}
    kept = to_model(made, model)
    assert {key: value.dtype for key, value in kept.items()} == {
        "input_ids": torch.long,
        "pixel_values": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("eos", "pad", "expected"),
    [(2, None, ([2], 2)), ([3, 2], None, ([3, 2], 3)), ([3, 2], 0, ([3, 2], 0)), (None, None, ([], None))],
)
def test_padding_is_the_first_end_token_unless_the_model_names_one(
    eos: int | list[int] | None, pad: int | None, expected: tuple[list[int], int | None]
) -> None:
    assert end_tokens(model_with(eos, pad)) == expected
