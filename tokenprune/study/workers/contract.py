"""What a worker is, how it is made, and what it says to the process that shares out the requests."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import tokenprune.errors
from tokenprune.errors import InputError, TokenPruneError

Given = TypeVar("Given", contravariant=True)
Got = TypeVar("Got", covariant=True)


class Worker(Protocol[Given, Got]):
    """A loaded model that answers requests."""

    @property
    def run(self) -> str:
        """Key of all that its answers depend on beside the request."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is told of it beside the results: dtype, device."""
        ...

    def __call__(self, request: Given, /) -> Got:
        """The answer. Both are plain data: they travel between processes."""
        ...


class Make(Protocol[Given, Got]):
    """How a process gets its worker, number `number` of `count`, from 0. It is pickled, model and all that it holds."""

    def __call__(self, number: int, count: int, /) -> Worker[Given, Got]: ...


class Workers(Protocol[Given, Got]):
    """One worker or several, on the same model."""

    run: str
    facts: Mapping[str, Any]

    def answers(self, requests: Sequence[Given]) -> Iterator[tuple[int, Got]]:
        """(index, answer) for each request, as they are done.

        Raises:
            TokenPruneError: the error of the first request, in their order, that a worker refused; all before it have
                been answered then.
        """
        ...


class Opened(Workers[Given, Got], Protocol[Given, Got]):
    """Workers that end when the block does."""

    def __enter__(self) -> Workers[Given, Got]: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


Said = tuple[str, Any]
"""What a worker says, a kind and its content: ``ready`` (run, facts); of a request, by its number, ``done`` (number,
answer) or ``refused`` (number, error), where number None stands for the start; ``failed`` and a traceback."""


def started(make: Make[Any, Any], number: int, count: int) -> tuple[Worker[Any, Any] | None, Said]:
    """A worker and what it says first; None where it cannot start."""
    made: list[Worker[Any, Any]] = []

    def start() -> Said:
        made.append(make(number, count))
        return "ready", (made[0].run, dict(made[0].facts))

    said = _saying(None, start)
    return (made[0] if made else None), said


def answered(worker: Worker[Any, Any], number: int, request: Any) -> Said:
    """What the worker says of request `number`."""
    return _saying(number, lambda: ("done", (number, worker(request))))


def _saying(number: int | None, what: Callable[[], Said]) -> Said:
    try:
        return what()
    except TokenPruneError as error:
        return "refused", (number, _portable(error))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            told = "a worker ran out of the device's memory; try fewer workers, smaller batches or --dtype bfloat16"
            return "refused", (number, InputError(told))
        return "failed", traceback.format_exc()


def _portable(error: TokenPruneError) -> TokenPruneError:
    """The same message as an error that can be pickled: of the nearest class that takes a message alone."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == tokenprune.errors.__name__)
    return kind(str(error))
