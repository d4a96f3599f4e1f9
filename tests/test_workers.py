"""`Pool`: who gets which request, and what follows where a worker dies or refuses, without any process."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from tokenprune.errors import BudgetError, InputError, RecipeError
from tokenprune.recipe.text.problems import InvalidRecipeError
from tokenprune.study.workers import Pool, Processes
from tokenprune.study.workers.contract import answered, started
from tokenprune.study.workers.pool import TRIES, Link

Answer = Callable[[int, str], tuple[str, Any]]


class Staged(Pool[str, str]):
    """Workers that are played: `answer` tells what one says of a request; each turn the longest busy one speaks."""

    def __init__(self, answer: Answer, count: int, runs: tuple[str, ...] = ("run",)) -> None:
        super().__init__(lambda *_: None, count)  # type: ignore[arg-type,return-value]
        self.answer, self.runs = answer, deque(runs)
        self.speaking: deque[tuple[Link, str, Any]] = deque()
        self.sent: list[tuple[int, str]] = []
        """(worker, request) in the order in which they were given out."""
        self.closed = 0
        self.latest_first = False

    def _open(self) -> None:
        self.closed = 0

    def _start(self, number: int) -> Link:
        link = Link(number)
        run = self.runs[0] if len(self.runs) == 1 else self.runs.popleft()
        self.speaking.append((link, "gone", "ill") if run == "" else (link, "ready", (run, {"of": run})))
        return link

    def _send(self, link: Link, number: int, request: str) -> None:
        self.sent.append((link.number, request))
        kind, content = self.answer(link.number, request)
        self.speaking.append((link, kind, content if kind in ("gone", "failed") else (number, content)))

    def _messages(self) -> list[tuple[Link, str, Any]]:
        return [self.speaking.pop() if self.latest_first else self.speaking.popleft()]

    def _close(self) -> None:
        self.closed += 1


def echo(number: int, request: str) -> tuple[str, Any]:
    return "done", request.upper()


def test_every_request_is_answered_once_and_in_turn() -> None:
    with Staged(echo, 2) as pool:
        assert (pool.run, pool.facts) == ("run", {"of": "run"})
        assert sorted(pool.answers("abcde")) == list(enumerate("ABCDE"))
        assert [request for _, request in pool.sent] == list("abcde")
        assert {worker for worker, _ in pool.sent} == {0, 1}
        assert sorted(pool.answers("xy")) == [(0, "X"), (1, "Y")]
        assert list(pool.answers("")) == []
    assert pool.closed == 1


def test_what_a_dead_worker_was_at_is_asked_again_by_another() -> None:
    killed: list[str] = []

    def answer(number: int, request: str) -> tuple[str, Any]:
        if request in "bd" and request not in killed:
            killed.append(request)
            return "gone", "killed"
        return echo(number, request)

    with Staged(answer, 2) as pool:
        assert sorted(pool.answers("abcde")) == list(enumerate("ABCDE"))
    assert sorted(request for _, request in pool.sent) == sorted("abbcdde")


def test_a_request_that_kills_every_worker_ends_the_run() -> None:
    def answer(number: int, request: str) -> tuple[str, Any]:
        return ("gone", "killed by hand") if request == "b" else echo(number, request)

    told = f"{TRIES} workers ended over the same questions, killed by hand; is there memory for 2 of them"
    with Staged(answer, 2) as pool, pytest.raises(InputError, match=told):
        list(pool.answers("abc"))
    assert [request for _, request in pool.sent].count("b") == TRIES and pool.closed == 1


def test_workers_that_die_before_they_answer_end_the_run() -> None:
    pool = Staged(echo, 1, runs=("",))
    with pytest.raises(InputError, match="3 workers ended before they had answered anything, ill"):
        pool.__enter__()
    assert pool.closed == 1
    with Staged(echo, 1, runs=("", "", "run")) as pool:
        assert list(pool.answers("a")) == [(0, "A")]


def test_a_worker_that_dies_idle_is_replaced_without_blame() -> None:
    with Staged(echo, 2) as pool:
        list(pool.answers("ab"))
        for _ in range(2 * TRIES):
            list(pool.answers("xyxy"))  # both are ready
            pool.speaking.appendleft((pool._links[-1], "gone", "killed"))
            assert list(pool.answers("a")) == [(0, "A")]  # the first link's
        assert len(pool._links) == 2


def test_the_first_refusal_in_order_is_told_once_all_before_it_are_answered() -> None:
    killed: list[str] = []

    def answer(number: int, request: str) -> tuple[str, Any]:
        if request == "b" and not killed:
            killed.append(request)
            return "gone", "killed"
        return ("refused", BudgetError(f"no {request}")) if request in "cde" else echo(number, request)

    with Staged(answer, 4) as pool:
        found: list[tuple[int, str]] = []
        with pytest.raises(BudgetError, match="no c"):
            found.extend(pool.answers("abcdefgh"))
        assert found == [(0, "A"), (1, "B")]
        assert not {request for _, request in pool.sent} & set("gh")
        # They go on, and what those behind the refusal still say is no answer to anything else.
        assert sorted(pool.answers("klmnop")) == list(enumerate("KLMNOP"))


def test_of_several_refusals_the_first_in_order_is_told_whoever_speaks_first() -> None:
    def answer(number: int, request: str) -> tuple[str, Any]:
        return ("refused", BudgetError(f"no {request}")) if request in "bcd" else echo(number, request)

    with Staged(answer, 4) as pool:
        list(pool.answers("xxxx"))  # all are ready
        pool.latest_first = True
        with pytest.raises(BudgetError, match="no b"):
            list(pool.answers("abcd"))


def test_what_was_given_up_answers_nothing_else() -> None:
    with Staged(echo, 3) as pool:
        for _ in pool.answers("abc"):
            break
        assert sorted(pool.answers("klm")) == list(enumerate("KLM"))


def test_workers_on_two_models_are_refused() -> None:
    with (
        Staged(echo, 2, runs=("one", "two")) as pool,
        pytest.raises(InputError, match="the workers do not run the same model: did its files change"),
    ):
        list(pool.answers("abcd"))


def test_a_worker_that_fails_is_shown() -> None:
    with Staged(lambda *_: ("failed", "Traceback: boom"), 1) as pool, pytest.raises(RuntimeError, match="boom"):
        list(pool.answers("a"))
    assert pool.closed == 1


class OutOfMemoryError(RuntimeError):
    """Called as torch's is."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BudgetError("too much"), ("refused", (4, BudgetError("too much")))),
        (InvalidRecipeError(()), ("refused", (4, RecipeError("")))),
        (OutOfMemoryError(), ("refused", (4, InputError("a worker ran out of the device's memory; try fewer")))),
        (ZeroDivisionError("by zero"), ("failed", "ZeroDivisionError: by zero")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_worker_says_can_travel(error: Exception, said: tuple[str, Any]) -> None:
    def broken(request: object) -> object:
        raise error

    kind, content = pickle.loads(pickle.dumps(answered(broken, 4, "?")))  # type: ignore[arg-type]
    assert kind == said[0]
    if kind == "failed":
        assert content.strip().endswith(said[1])
        return
    number, told = content
    assert (number, type(told)) == (4, type(said[1][1])) and str(told).startswith(str(said[1][1]))


def test_a_worker_that_cannot_start_says_so() -> None:
    def make(number: int, count: int) -> Any:
        raise RecipeError(f"{number} of {count}")

    worker, (kind, (number, error)) = started(make, 1, 2)
    assert (worker, kind, number, str(error)) == (None, "refused", None, "1 of 2")


def test_what_no_other_process_can_find_is_refused_before_one_starts() -> None:
    model = object()
    with pytest.raises(InputError, match=r"what loads the model cannot be sent to another process .*lambda"):
        Processes(lambda *_: model, 2).__enter__()  # type: ignore[arg-type,return-value]
