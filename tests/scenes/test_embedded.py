"""The shipped model: small, itself, and really answering."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import tokenprune.scenes as scenes
from tokenprune.scenes.answering import answer
from tokenprune.scenes.digest import digest
from tokenprune.scenes.training.phases import PHASES
from tokenprune.scenes.training.trainer import make_plan
from tokenprune.scenes.world.generate import TEST_SEEDS, scene
from tokenprune.scenes.world.questions import questions
from tokenprune.scenes.world.vocabulary import VISION_TOKENS

MEASURED = Path(__file__).parents[2] / "benchmarks" / "scenes" / "accuracy.json"
Pair = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def embedded() -> Pair:
    return scenes.load_embedded()


def test_files_are_small_and_are_those_that_were_measured() -> None:
    weights = scenes.embedded_path() / "model.safetensors"
    assert weights.stat().st_size < 10e6
    assert digest(weights) == json.loads(MEASURED.read_text())["weights"]
    names = {file.name for file in scenes.embedded_path().iterdir()}
    assert {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json"} <= names
    everything = sum(file.stat().st_size for file in scenes.embedded_path().parent.rglob("*") if file.is_file())
    assert everything < 10e6


def test_stock_classes_load_it(embedded: Pair) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(scenes.embedded_path())
    assert model.dtype == torch.bfloat16 and model.config.text_config.num_hidden_layers >= 8
    assert model.config.text_config.rope_parameters["rope_theta"] == 10000.0
    assert isinstance(AutoProcessor.from_pretrained(scenes.embedded_path()), LlavaProcessor)
    assert embedded[0].dtype == torch.float32 and not embedded[0].training


@torch.no_grad()
def test_exactly_144_vision_tokens_enter(embedded: Pair) -> None:
    model, processor = embedded
    inputs = processor(images=Image.new("RGB", (96, 96)), text="<image>", return_tensors="pt")
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(VISION_TOKENS, model.config.text_config.hidden_size)]


def test_answers_on_held_out_scenes_are_far_above_chance(embedded: Pair) -> None:
    items = [scene(TEST_SEEDS[6], index) for index in range(24)]
    asked = [(item, question) for item in items for question in questions(item)]
    given = answer(*embedded, ((item.image, question.question) for item, question in asked))
    right: dict[str, list[bool]] = defaultdict(list)
    for (_, question), text in zip(asked, given, strict=True):
        right[question.task].append(question.is_right(text))
    accuracy = {task: np.mean(results) for task, results in right.items()}
    for task, floor in FLOORS.items():
        assert accuracy[task] >= floor, accuracy


FLOORS = {
    "localisation": 0.9,
    "relation": 0.4,
    "box": 0.7,
    "colour": 0.85,
    "shape": 0.85,
    "size": 0.85,
    "existence": 0.8,
    "counting": 0.6,
    "code": 0.6,
    "ground": 0.8,
}
"""What a model that learned each task reaches on these few scenes; chance is at most one half."""


def test_shipped_weights_reach_the_targets() -> None:
    """Of the measurement that the digest ties to the weights: 150 held-out scenes."""
    measured = json.loads(MEASURED.read_text())
    tasks = {name: row["accuracy"] for name, row in measured["tasks"].items()}
    assert tasks["localisation"] >= 0.9 and measured["difficulty"]["localisation: colour"]["accuracy"] >= 0.98
    assert min(tasks[name] for name in ("colour", "shape", "size")) >= 0.85
    assert tasks["existence"] >= 0.9 and tasks["counting"] >= 0.75 and tasks["code"] >= 0.6


def test_the_script_trains_what_was_shipped() -> None:
    """Plan, phases and log of the shipped run are those of the training script as it is."""
    stored = json.loads((MEASURED.parent / "training.json").read_text())
    plan = make_plan(0, "fp32")
    assert stored == {**asdict(plan), "stages": [asdict(phase) for phase in PHASES]}
    lines = [json.loads(line) for line in (MEASURED.parent / "training_log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line["step"] for line in lines}
    assert last == plan.steps


def test_answers_are_words_of_their_task(embedded: Pair) -> None:
    item = scene(TEST_SEEDS[6], 30)
    asked = questions(item)
    for question, text in zip(asked, answer(*embedded, [(item.image, q.question) for q in asked]), strict=True):
        assert len(text.split()) == len(question.answer.split()) and "<" not in text


def test_a_question_alone_gets_the_answer_it_gets_in_a_batch(embedded: Pair) -> None:
    item = scene(TEST_SEEDS[6], 31)
    pairs = [(item.image, question.question) for question in questions(item)]
    assert answer(*embedded, pairs) == [answer(*embedded, [pair])[0] for pair in pairs]


def test_samples_cover_all_tasks_and_the_first_is_answered(embedded: Pair) -> None:
    shipped = scenes.samples()
    assert {sample.task for sample in shipped} == set(scenes.TASKS)
    assert shipped[0].task == "localisation"
    photographic = [sample.ground in ("brick", "grass", "gravel", "wood") for sample in shipped]
    assert photographic[0] and sum(photographic) * 2 >= len(shipped)
    for sample in shipped:
        with Image.open(sample.path) as picture:
            assert picture.size == (384, 384)
    with Image.open(shipped[0].path) as picture:
        assert answer(*embedded, [(picture, shipped[0].question)]) == [shipped[0].answer]


def test_sample_pictures_are_those_of_their_seeds() -> None:
    entries = json.loads((scenes.samples()[0].path.parent / "samples.json").read_text())
    for entry, sample in zip(entries, scenes.samples(), strict=True):
        item = scene(*entry["seed"])
        assert item.seed in TEST_SEEDS and item.ground == sample.ground
        with Image.open(sample.path) as picture:
            assert np.array_equal(np.asarray(picture), item.render(384))
        assert (sample.question, sample.answer) in {(q.question, q.answer) for q in questions(item, [sample.task])}
