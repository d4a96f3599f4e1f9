"""`Alone`: this process answers all requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from tokenprune.study.workers.contract import Make

Given = TypeVar("Given")
Got = TypeVar("Got")


class Alone(Generic[Given, Got]):
    """This process answers all requests, in order.

    Args:
        make: the worker.

    Raises:
        TokenPruneError: what `make` raised.
    """

    def __init__(self, make: Make[Given, Got]) -> None:
        self._worker = make(0, 1)
        self.run: str = self._worker.run
        self.facts: Mapping[str, Any] = self._worker.facts

    def __enter__(self) -> Alone[Given, Got]:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def answers(self, requests: Sequence[Given]) -> Iterator[tuple[int, Got]]:
        """As `Workers.answers`."""
        for number, request in enumerate(requests):
            yield number, self._worker(request)
