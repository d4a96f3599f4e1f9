"""`Pool`: who gets which request, and what follows where a worker dies or refuses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from tokenprune.errors import InputError, TokenPruneError
from tokenprune.study.workers.contract import Make

TRIES = 3
"""So many workers may die over one request, or before they have answered anything."""

Given = TypeVar("Given")
Got = TypeVar("Got")
Self = TypeVar("Self", bound="Pool[Any, Any]")


@dataclass(eq=False)
class Link:
    """This process's end of the line to a worker."""

    number: int
    at: int | None = None
    """Number of the request that it is at; requests are numbered through, from the first call of `answers` on."""
    ready: bool = False


class Pool(ABC, Generic[Given, Got]):
    """Several workers, each with a model of its own; answers come back in the order in which they are done.

    Only this process hands out requests and writes, so a worker that dies loses nothing but the request that it was at:
    another one takes its place, and the request is made again. A worker that refuses a request goes on with the next.

    Args:
        make: a worker.
        count: how many.

    Raises:
        TokenPruneError: on entering, what `make` raised.
        InputError: workers die again and again over the same request, or before they have answered anything.
    """

    def __init__(self, make: Make[Given, Got], count: int) -> None:
        self._make, self._count = make, count
        self._links: list[Link] = []
        self._deaths: Counter[int | None] = Counter()
        """Workers that died, by the request that they were at; None: before their first one."""
        self._asked = 0
        self.run = ""
        self.facts: Mapping[str, Any] = {}

    def __enter__(self: Self) -> Self:
        try:
            self._open()
            for number in range(self._count):
                self._links.append(self._start(number))
            while not self.run:
                self._hear()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def answers(self, requests: Sequence[Given]) -> Iterator[tuple[int, Got]]:
        """As `Workers.answers`."""
        first, self._asked = self._asked, self._asked + len(requests)
        waiting = deque(range(first, self._asked))
        left = set(waiting)
        refused: dict[int, TokenPruneError] = {}
        while left:
            for link in self._links:
                if link.ready and link.at is None and waiting:
                    link.at = waiting.popleft()
                    self._send(link, link.at, requests[link.at - first])
            for kind, number, content in self._hear():
                if number not in left:
                    continue  # of an earlier call that was given up
                if kind == "lost":
                    waiting.appendleft(number)
                elif kind == "refused":
                    refused[number] = content
                    # One process would have stopped here: what comes before is still answered, nothing behind it.
                    waiting = deque(each for each in waiting if each < number)
                    left = {each for each in left if each < number}
                else:
                    left.remove(number)
                    yield number - first, content
        if refused:
            raise refused[min(refused)]

    def _hear(self) -> list[tuple[str, int | None, Any]]:
        """(kind, number, content) of requests that are ``done``, ``refused`` or ``lost``, once there is news."""
        heard: list[tuple[str, int | None, Any]] = []
        for link, kind, content in self._messages():
            if kind == "gone":
                heard.append(("lost", self._replace(link, content), None))
            elif kind == "ready":
                self._welcome(link, *content)
            elif kind == "failed":
                raise RuntimeError(f"a worker failed:\n{content}")
            else:
                number, told = content
                if number is None:
                    raise told
                link.at = None
                heard.append((kind, number, told))
        return heard

    def _welcome(self, link: Link, run: str, facts: Mapping[str, Any]) -> None:
        if self.run and run != self.run:
            raise InputError("the workers do not run the same model: did its files change?")
        self.run, self.facts = run, facts
        link.ready = True

    def _replace(self, link: Link, how: str) -> int | None:
        """Start another worker for one that is gone; number of the request that it was at."""
        self._links.remove(link)
        if not link.ready or link.at is not None:  # one that was idle has not died of anything that it did
            self._deaths[link.at] += 1
        if self._deaths[link.at] >= TRIES:
            when = "before they had answered anything" if link.at is None else "over the same questions"
            raise InputError(f"{TRIES} workers ended {when}, {how}; is there memory for {self._count} of them?")
        self._links.append(self._start(link.number))
        return link.at

    @abstractmethod
    def _open(self) -> None:
        """Before the first worker starts."""

    @abstractmethod
    def _start(self, number: int) -> Link:
        """A worker that is on its way: it says `started`."""

    @abstractmethod
    def _send(self, link: Link, number: int, request: Given) -> None:
        """Give a request to a worker that is ready: it says `answered`, unless it dies."""

    @abstractmethod
    def _messages(self) -> list[tuple[Link, str, Any]]:
        """What workers say, once any does; ``gone`` and how it ended, of one that has died."""

    @abstractmethod
    def _close(self) -> None:
        """End all workers."""
