"""`eval` and `tune` on several workers: the result of one process, whoever answers what, and whoever is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from killing import without_times
from PIL import Image

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.cli.workers import Loading, Responding
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.families.chat import Chat
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import Ask, Condition, Evaluation, Respondent, evaluate_on, make_conditions
from tokenprune.study.tune import make_space, tune_on
from tokenprune.study.workers import Alone, Pool, Processes
from tokenprune.study.workers.contract import answered
from tokenprune.study.workers.pool import Link

ONE_BUDGET = [Budget("keep", 0.5)]


@cache
def respondent() -> Respondent:
    return Respondent(Chat("embedded", *tp.load("embedded")))


class Disorderly(Pool[Any, Any]):
    """Workers that answer in any order, and die over the first try of every `mortal`-th batch; all is pickled."""

    def __init__(self, count: int, mortal: int = 0, seed: int = 0) -> None:
        super().__init__(lambda *_: respondent(), count)
        self.mortal, self.chance = mortal, random.Random(seed)
        self.words: list[tuple[Link, str, Any]] = []
        self.tried: set[int] = set()
        self.asked: list[tuple[int, Any]] = []

    def _open(self) -> None:
        pass

    def _start(self, number: int) -> Link:
        link = Link(number)
        self.words.append((link, "ready", (respondent().run, respondent().facts)))
        return link

    def _send(self, link: Link, number: int, request: Any) -> None:
        request = pickle.loads(pickle.dumps(request))
        self.asked.append((link.number, request))
        if self.mortal and isinstance(request, Ask) and number % self.mortal == 0 and number not in self.tried:
            self.tried.add(number)
            self.words.append((link, "gone", "killed"))
        else:
            self.words.append((link, *pickle.loads(pickle.dumps(answered(respondent(), number, request)))))

    def _messages(self) -> list[tuple[Link, str, Any]]:
        return [self.words.pop(self.chance.randrange(len(self.words)))]

    def _close(self) -> None:
        pass


def told(result: Evaluation) -> Any:
    """All but times."""
    return without_times(result.to_dict()), [(each.answers, each.flops, each.average) for each in result.outcomes]


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [Budget("keep", 0.5), Budget("flops", 0.8)], ids=str)
def test_the_result_is_that_of_one_process(budget: Budget, packed: bool, tmp_path: Path) -> None:
    cases = tp.scene_cases(2, tasks=["colour", "shape"])
    conditions = make_conditions(["fastv"], [budget], draws=1)
    evaluated: Callable[..., Evaluation] = partial(
        evaluate_on, cases=cases, conditions=conditions, batch_size=3, packed=packed
    )
    expected = told(evaluated(Alone(lambda *_: respondent())))
    for seed in range(2):
        with Disorderly(3, mortal=3, seed=seed) as pool:
            assert told(evaluated(pool, output=tmp_path)) == expected
            asked = [request for _, request in pool.asked if isinstance(request, Ask)]
            if seed == 0:
                assert len(pool.tried) > 2 and len({worker for worker, _ in pool.asked}) == 3
            else:
                assert not asked  # all was on disk
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == len(conditions) * -(-len(cases) // 3)


def test_what_is_asked_alike_is_asked_once() -> None:
    recipe = tp.load_recipe("fastv", keep=0.5)
    cases = tp.scene_cases(1, tasks=["colour"])
    twice = [Condition(label, recipe=recipe, budget=ONE_BUDGET[0]) for label in ("one", "other")]
    done: list[tuple[int, int]] = []
    with Disorderly(2) as pool:
        result = evaluate_on(pool, cases, twice, on_batch=lambda *at: done.append(at))
    assert sum(isinstance(request, Ask) for _, request in pool.asked) == 2
    assert result.outcomes[1].answers == result.outcomes[2].answers and done == [(1, 3), (2, 3), (3, 3)]


def test_what_is_wrong_is_told_as_by_one_process() -> None:
    wrong = Case(partial(Image.new, "RGB", (8, 8)), "p", "what is <image> ?", "x")
    for cases, conditions in (([wrong], []), (tp.scene_cases(1), [Condition("c", recipe=bad())])):
        messages = []
        for workers in (Alone(lambda *_: respondent()), Disorderly(2)):
            with workers, pytest.raises((InputError, RecipeError, UnsupportedModelError)) as error:
                evaluate_on(workers, cases, conditions)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]


def bad() -> tp.Recipe:
    """A stage before a layer that the embedded model has not."""
    return tp.load_recipe("fastv", sets=["stages.0.place={before_layer: 40}"])


def test_a_search_on_several_workers_is_that_of_one_process(tmp_path: Path) -> None:
    choose: dict[str, list[object]] = {
        "stages.0.scorer": ["norm", "attention"],
        "stages.0.place": ["after_vision", {"before_layer": "1/8"}],
    }
    space, cases = make_space("fastv", choose), tp.scene_cases(2, tasks=["colour"])
    found = []
    for workers in (Alone(lambda *_: respondent()), Disorderly(2, mortal=2)):
        with workers:
            tuned = tune_on(workers, cases, space, average=0.4, trials=4, draws=1, batch_size=2, packed=True)
        found.append((without_times(tuned.to_dict()), tuned.dump()))
    assert found[0] == found[1] and found[0][0]["skipped"]


SMALL = ("--scenes", 2, "--task", "colour", "--seeds", 1, "--batch-size", 2, "--json")
COMMANDS: dict[str, tuple[object, ...]] = {
    "eval": ("eval", "fastv", "--keep", 0.5, *SMALL),
    "tune": ("tune", "fastv", "--choose", "stages.0.sampler=top_k,max_min", "--average", 0.4, *SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_with_workers_that_are_killed(command: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    one = cli(*COMMANDS[command], "--output", tmp_path / "one")
    results, done, kills = tmp_path / "many" / "results.jsonl", threading.Event(), []

    def kill() -> None:
        """All workers, once they have answered something: one of them at least is at work."""
        while not kills and not done.wait(0.02):
            if results.exists() and results.stat().st_size:
                kills.extend(worker.pid for worker in multiprocessing.active_children())
                for worker in kills:
                    os.kill(worker, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        many = cli(*COMMANDS[command], "--output", tmp_path / "many", "--workers", 2)
    finally:
        done.set()
        thread.join()
    assert len(kills) == 2
    assert (many.status, many.err) == (0, "")
    assert without_times(json.loads(many.out)) == without_times(json.loads(one.out))
    assert not multiprocessing.active_children()


PART = """import tokenprune as tp


class LeftScorer(tp.Scorer):
    multiply_adds = tp.no_products
    reads = tp.Needs(grid=True)

    def __init__(self) -> None:
        super().__init__()
        self.check()

    def forward(self, tokens, raters=None):
        return -tokens.cell[..., 2].float()
"""


@pytest.mark.slow
def test_workers_know_the_parts_of_plug_ins_and_say_what_they_cannot_load(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "left.py").write_text(PART)
    (tmp_path / "mine.yaml").write_text(
        "version: 1\nbudget: {keep: 0.5}\nstages:\n  - {place: after_vision, scorer: left}\n"
    )
    asked = ("eval", "mine.yaml", "--keep", 0.5, *SMALL, "--no-baselines", "--plugin", "left.py")
    one, many = cli(*asked), cli(*asked, "--workers", 2)
    assert (many.status, many.err) == (0, "")
    assert without_times(json.loads(many.out)) == without_times(json.loads(one.out))
    ran = cli("eval", "fastv", "--scenes", 1, "--model", "./nowhere", "--workers", 2)
    assert (ran.status, ran.out) == (2, "") and "no such model folder: ./nowhere" in ran.err


def test_a_model_in_the_caller_s_hands_cannot_be_sent() -> None:
    model = respondent().chat.model
    with pytest.raises(InputError, match="what loads the model cannot be sent to another process"):
        Processes(lambda *_: Respondent(Chat("", model, None)), 2).__enter__()
    assert pickle.loads(pickle.dumps(Responding(Loading("embedded", None, None, "sdpa"))))(0, 1).run == respondent().run


def test_a_case_that_cannot_be_sent_is_told() -> None:
    picture = Image.new("RGB", (8, 8))
    case = Case(lambda: picture, "p", "?", "x")
    pool: Processes[Any, Any] = Processes(Responding(Loading("embedded", None, None, "sdpa")), 1)
    with pytest.raises(InputError, match=r"a request cannot be sent .*: give functions of a module"):
        pool._send(Link(0), 0, case)
