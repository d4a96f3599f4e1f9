"""Questions that share a picture, asked together: what `generate` and the engine make of each of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Row, build, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ATTENTION, KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, worst
from reference import generate_logits
from torch import Tensor
from towers import INSIDE

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.core.report import Report
from tokenprune.engine.packed.generate import packed_run, shared_layers
from tokenprune.engine.packed.prompt import pack
from tokenprune.errors import InputError
from tokenprune.families.chat import Chat
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.stage import Stage
from tokenprune.study.evaluate import Case
from tokenprune.study.evaluate.packing import PackedAsker

STEPS = 3
LOOKS = {"scorer": ATTENTION, "raters": "last_text"}
BLIND = ({"scorer": {"type": "random", "seed": 3}}, {"sampler": "uniform"}, {"scorer": "raster"}, {"scorer": "norm"})


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat("embedded", *load_embedded())


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return scene_cases(3)


@torch.inference_mode()
def alone(chat: Chat, cases: list[Case], recipe: Any) -> tuple[tuple[Tensor, ...], Report]:
    """Logits of the first tokens of each answer, from plain forwards under the engine, left-padded."""
    inputs = chat.batch([[case.picture()] for case in cases], [case.question for case in cases])
    with tp.attach(chat.model, recipe) as attached:
        made = chat.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return made.logits, attached.report


@torch.inference_mode()
def together(chat: Chat, cases: list[Case], recipe: Any, like: tuple[Tensor, ...]) -> tuple[list[Tensor], Report]:
    """The same, packed; each step is fed what was generated there."""
    with tp.attach(chat.model, recipe) as attached:
        run = packed_run(attached, PackedAsker(chat).prompt(cases))
        logits = [run.prefill()]
        for given_logits in like[:-1]:
            banned = given_logits.clone()
            banned[:, chat.model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
            logits.append(run.step(banned.argmax(-1)))
    return logits, attached.report


def same(chat: Chat, cases: list[Case], recipe: Any) -> Report:
    expected, plain = alone(chat, cases, recipe)
    logits, report = together(chat, cases, recipe, expected)
    scale = max(1.0, max(float(step.abs().max()) for step in expected))
    assert worst(tuple(logits), expected) < TOLERANCE * scale
    assert torch.equal(report.vision_tokens, plain.vision_tokens)
    assert (report.total, report.grids) == (plain.total, plain.grids)
    for one, other in zip(report.to_dict()["stages"], plain.to_dict()["stages"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    return report


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", tp.list_recipes())
def test_every_recipe(name: str, chat: Chat, cases: list[Case]) -> None:
    if name in INSIDE:
        with pytest.raises(InputError, match="the vision tower has not run for this prompt"):
            together(chat, cases, name, ())
        return
    same(chat, cases, name)


def test_a_stage_deep_in_the_model_that_reads_the_tower(chat: Chat, cases: list[Case]) -> None:
    """Questions of one picture share what the tower has seen of it."""
    same(chat, cases, "vscan")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*tp.list_recipes()} - {*INSIDE, "none"}))
def test_every_recipe_with_a_budget(name: str, chat: Chat, cases: list[Case]) -> None:
    report = same(chat, cases, tp.load_recipe(name, average=0.6))
    assert bool((report.feed_forward_tokens[:, -1] < 144).all())


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_places_and_counts(data: st.DataObject, chat: Chat, cases: list[Case]) -> None:
    places = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True).map(sorted))
    counts = sorted((data.draw(st.integers(1, 144)) for _ in places), reverse=True)
    parts = data.draw(st.lists(st.sampled_from([LOOKS, *BLIND]), min_size=3, max_size=3))
    positions = data.draw(st.sampled_from(["original", "renumber"]))
    stages = [
        stage(place, fixed(count), positions=positions, **part)
        for place, count, part in zip(places, counts, parts, strict=False)
    ]
    start = data.draw(st.integers(0, len(cases) - 4))
    same(chat, cases[start : start + 4], recipe("drawn", *stages))


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_any_llava_with_text_before_the_picture(kind: str, attention: Any) -> None:
    """Random weights, two pictures, questions of 1 to 9 tokens, and shares of the pictures that differ."""
    model = build("llava", attention=attention)
    batch = inputs("llava", model, rows=[Row(images=[(20, 20)], between=0)] * 2)
    ids = batch["input_ids"][0]
    image = model.config.image_token_id
    width = int((ids == image).nonzero().max()) + 1
    assert int(ids[0]) != image, "no text before the picture"
    words = [int(i) for i in ids if i != image]
    questions = [(words * 3)[start : start + length] for start, length in ((0, 9), (1, 1), (2, 4), (0, 6), (3, 2))]
    owner = [1, 0, 1, 1, 0]
    pixels = batch["pixel_values"]
    chosen = KINDS.get(kind, kind)
    prompt = pack(model, {"pixel_values": pixels}, ids[:width].expand(2, -1), questions, owner)
    with tp.attach(model, chosen) as attached:
        run = packed_run(attached, prompt)
        first = run.prefill()
        said = first.clone()
        said[:, model.generation_config.suppress_tokens or []] = -torch.inf  # as `generate` does
        second = run.step(said.argmax(-1))
        counts = attached.report.vision_tokens
        for row, (question, picture) in enumerate(zip(questions, owner, strict=True)):
            alone = torch.cat([ids[:width], torch.tensor(question)])[None]
            expected = logits_of(model, {"input_ids": alone, "pixel_values": pixels[picture][None]})[0, -1]
            assert torch.allclose(first[row], expected, atol=TOLERANCE, rtol=0)
            assert torch.equal(counts[row], attached.report.vision_tokens[0])
            made = generate_logits(
                model, {"input_ids": alone, "pixel_values": pixels[picture][None]}, max_new_tokens=2, min_new_tokens=2
            )[1]
            assert torch.allclose(second[row], made[1][0], atol=TOLERANCE, rtol=0)


def test_what_looks_at_the_question_is_not_shared() -> None:
    """All 8 layers, or those below the first stage."""

    def shared(*stages: dict[str, Any], **more: Any) -> int:
        return shared_layers(tp.build(recipe("r", *stages, **more), depth=8), 8)

    blind = stage(2, fixed(0.5), scorer="norm")
    assert shared(blind) == shared() == shared(blind, budget={"average": 0.7}) == 8
    assert shared(stage(3, fixed(0.5), **LOOKS)) == 3
    assert shared(blind, stage(5, fixed(0.2), **LOOKS)) == 2
    same, other = (foreign_pipeline(reads) for reads in (Needs(), Needs(question=True)))
    assert (shared_layers(same, 8), shared_layers(other, 8)) == (8, 2)
    assert shared_layers(foreign_pipeline(Needs(question=True, earlier=2)), 8) == 1  # that layer must see the question


def foreign_pipeline(declared: Needs) -> tp.Pipeline:
    """A pipeline with a scorer of somebody else's before layer 2, which says what it reads."""

    class Foreign(NormScorer):
        reads = declared

    (like,) = tp.build(recipe("r", stage(2, fixed(0.5), scorer="norm")), depth=8)
    foreign = Stage(
        place=like.place, scheduler=like.scheduler, scorer=Foreign(), sampler=like.sampler, recycler=like.recycler
    )
    return tp.Pipeline([foreign], depth=8)
