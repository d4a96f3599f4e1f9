"""The processor: any picture, any words, and exactly the prompt of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from tokenprune.scenes.answering import prompt
from tokenprune.scenes.training.batches import encode, question_tokens, to_pixels
from tokenprune.scenes.world.generate import TEST_SEEDS, scene
from tokenprune.scenes.world.questions import questions, words
from tokenprune.scenes.world.vocabulary import ANSWER, BOS, IMAGE, VISION_TOKENS, build_processor, token_ids

SEED = TEST_SEEDS[5]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def test_prompt_is_exactly_that_of_training(processor: LlavaProcessor) -> None:
    ids = token_ids()
    item = scene(SEED, 0)
    for question in questions(item):
        content = [{"type": "image", "image": Image.fromarray(item.image)}, {"type": "text", "text": question.question}]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        segment = question_tokens(question)
        length = len(question.question.split()) + 1
        expected = [ids[BOS], *[ids[IMAGE]] * VISION_TOKENS, *segment.ids[:length]]
        assert inputs["input_ids"][0].tolist() == expected and expected[-1] == ids[ANSWER]
        torch.testing.assert_close(inputs["pixel_values"], to_pixels([item.image]))
        text = processor(text=prompt(processor, question.question), images=item.image, return_tensors="pt")
        assert text["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
@pytest.mark.parametrize("size", [(96, 96), (17, 400), (1200, 900)])
def test_any_picture_goes_in(processor: LlavaProcessor, mode: str, size: tuple[int, int]) -> None:
    inputs = processor(images=Image.new(mode, size), text=prompt(processor, "where is it ?"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == token_ids()[IMAGE]).sum() == VISION_TOKENS


def test_a_photo_of_twelve_megapixels_goes_in(processor: LlavaProcessor) -> None:
    photo = Image.fromarray(np.zeros((3000, 4000, 3), np.uint8))
    assert processor(images=photo, text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)


def test_words_are_lower_cased_split_and_unknown_ones_accepted(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Where's the RED circle, zebra?")["input_ids"])
    assert tokens == ["<s>", "where", "<unk>", "<unk>", "the", "red", "circle", "<unk>", "<unk>", "?"]
    assert tokenizer("")["input_ids"] == [token_ids()[BOS]]


def test_every_known_word_survives_a_round_trip(processor: LlavaProcessor) -> None:
    text = " ".join(words())
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == encode(text)
    assert processor.tokenizer.decode([*ids, token_ids()["</s>"]], skip_special_tokens=True) == text


def test_batches_are_padded_on_the_left(processor: LlavaProcessor) -> None:
    picture = Image.new("RGB", (96, 96))
    texts = [prompt(processor, q) for q in ("where is the red circle ?", "how many things ?")]
    inputs = processor(images=[picture] * 2, text=texts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1] and inputs["attention_mask"][1, 0] == 0
    assert inputs["input_ids"][:, -1].tolist() == [token_ids()[ANSWER]] * 2


def test_processor_needs_no_torchvision(processor: LlavaProcessor) -> None:
    assert "Pil" in type(processor.image_processor).__name__


def test_saved_files_name_no_machine(tmp_path: Path) -> None:
    build_processor().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert "/" not in file.read_text(encoding="utf-8").replace("</s>", "").replace("\\/", ""), file.name
