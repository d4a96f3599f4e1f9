"""Several threads on one attached model: each gets its own answers and its own report."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import IMAGE, Row, build, inputs, row_inputs, sizes, text_only_inputs
from kinds import KINDS, fixed, recipe, stage

import tokenprune as tp
from tokenprune.errors import NotFiredError, UnprunedWarning

LAYERS = 6
RECIPES = {
    **{kind: KINDS[kind] for kind in ("after_vision", "attention", "adaptive", "merging")},
    "renumbered": recipe("renumbered", stage(2, fixed(0.4), scorer="norm", positions="renumber")),
}


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Threads take turns after ten microseconds instead of five milliseconds."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each of the jobs returns, all run at once; the first error is raised."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def prompts(family: str, model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Prompts of different length and number, with and without padding, with and without a picture, each with a way to
    generate."""
    first, last = sizes(family)[0], sizes(family)[-1]
    batch = inputs(family, model)
    long = inputs(family, model, rows=[Row(before=9, images=(last, first), after=4)], seed=3)
    return [
        (row_inputs(batch, 0), {}),
        (batch, {}),
        (long, {"cache_implementation": "static"}),
        (row_inputs(batch, 1), {"num_beams": 2}),
        (text_only_inputs(family, model, lengths=(7,)), {}),
    ]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_each_thread_gets_its_own_answers_and_report(family: str, kind: str) -> None:
    model = build(family, layers=LAYERS)
    asked = prompts(family, model)

    def job(number: int, times: int) -> Any:
        batch, how = asked[number]
        told = []
        for _ in range(times):
            answer = model.generate(**batch, max_new_tokens=4, do_sample=False, **how)
            text = batch["input_ids"].eq(IMAGE).sum() == 0
            told.append((answer.tolist(), None if text else [each.kept.tolist() for each in attached.report.stages]))
            if not text:
                assert attached.report.prefills == len(told)
        return told

    with tp.attach(model, RECIPES[kind]) as attached:
        alone = [together([lambda number=number: job(number, 1)])[0] for number in range(len(asked))]
        for found, expected in zip(
            together([lambda number=number: job(number, 4) for number in range(len(asked))]), alone, strict=True
        ):
            assert found == expected * 4


def test_an_error_in_one_thread_leaves_the_others_alone() -> None:
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    good, bad = row_inputs(batch, 0), {**row_inputs(batch, 0), "pixel_values": torch.randn(2, 3, 20, 20)}

    def fails() -> int:
        caught = 0
        for _ in range(6):
            try:
                model.generate(**bad, max_new_tokens=2, do_sample=False)
            except ValueError:
                caught += 1
        return caught

    def works() -> list[Any]:
        return [model.generate(**good, max_new_tokens=4, do_sample=False).tolist() for _ in range(6)]

    with tp.attach(model, KINDS["attention"]):
        expected = works()
        assert together([works, fails, works]) == [expected, 6, expected]


def test_a_thread_that_has_run_nothing_is_told_of_the_last_run() -> None:
    model = build("llava", layers=LAYERS)
    one, two = (row_inputs(inputs("llava", model), row) for row in (0, 1))
    with tp.attach(model, KINDS["after_vision"]) as attached:
        together([lambda: model(**two)])
        assert attached.report.total == (50,)
        model(**one)
        together([lambda: model(**two)])
        assert attached.report.total == (25,)
        assert together([lambda: attached.report.total]) == [(50,)]


def test_what_one_thread_says_of_embeddings_holds_for_it_alone() -> None:
    model = build("llava", layers=LAYERS)
    one = row_inputs(inputs("llava", model), 0)
    embedded = model.get_input_embeddings()(one["input_ids"]) + 1e-3
    with tp.attach(model, KINDS["after_vision"]) as attached, attached.vision_at(one["input_ids"] == IMAGE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnprunedWarning)
            together([lambda: model(inputs_embeds=embedded)])
        with pytest.raises(NotFiredError):
            _ = attached.report.total
        model(inputs_embeds=embedded)
        assert attached.report.total == (25,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", [fixed(0.4), {"type": "rank_ratio", "scale": 0.5, "energy": 0.9}], ids=["static", "adaptive"]
)
def test_a_compiled_model_answers_several_threads(scheduler: dict[str, Any]) -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    asked = [row_inputs(batch, 0), row_inputs(batch, 1)]
    one = recipe("one", stage(1, scheduler, raters="last_text", scorer={"type": "attention"}))

    def job(number: int, times: int) -> Any:
        return [
            (
                model.generate(**asked[number], max_new_tokens=4, do_sample=False).tolist(),
                [each.kept.tolist() for each in attached.report.stages],
            )
            for _ in range(times)
        ]

    with tp.attach(model, one) as attached:
        alone = [job(number, 1) for number in range(2)]
    with tp.attach(model, one, compile={"backend": "eager"}) as attached:
        found = together([lambda number=number: job(number, 4) for number in range(2)])
    torch.compiler.reset()
    assert found == [each * 4 for each in alone]
