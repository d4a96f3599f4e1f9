"""Processes that share a list of batches: one, or several of which any may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

from tokenprune.errors import InputError, TokenPruneError
from tokenprune.study.many.answerer import Answerer, Done
from tokenprune.study.many.batches import Line

TRIES = 3
"""So many processes may be killed over one batch, or before they have answered anything."""

Batch = tuple[Sequence[Line], bool]
"""Questions, and whether they are also asked with all vision tokens."""


class Make(Protocol):
    """How a process gets its answerer; it must be picklable. Worker `number` of `count`, from 0."""

    def __call__(self, number: int, count: int) -> Answerer: ...


class Alone:
    """This process answers all batches.

    Args:
        make: the answerer.
    """

    def __init__(self, make: Make) -> None:
        self._answerer = make(0, 1)
        self.run, self.facts = self._answerer.run, self._answerer.facts

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def answers(self, batches: Sequence[Batch]) -> Iterator[tuple[int, Done]]:
        """(index, what came of it) for each batch."""
        for number, (lines, measure) in enumerate(batches):
            yield number, self._answerer(lines, measure)


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    batch: int | None = None
    """Index of what it is at."""
    ready: bool = False


class Pool:
    """Several processes, each with an answerer of its own; batches come back in the order in which they are done.

    Only this process writes and hands out work, so a worker that is killed loses nothing but the batch that it was at:
    another process takes its place, and the batch is asked again. Workers end by themselves when this process does.

    Args:
        make: the answerer of a process.
        count: how many processes.

    Raises:
        TokenPruneError: on entering, what `make` raised.
        InputError: processes are killed again and again over the same batch, or before they have answered anything.
    """

    def __init__(self, make: Make, count: int) -> None:
        self._make, self._count = make, count
        self._workers: dict[Connection, _Worker] = {}
        self._deaths: Counter[int | None] = Counter()
        """Processes that were killed, by the batch that they were at; None: before their first one."""
        self.run = ""
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Pool:
        try:
            for number in range(self._count):
                self._start(number)
            while not self.run:
                for connection, kind, content in self._messages():
                    self._hear(connection, kind, content)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def answers(self, batches: Sequence[Batch]) -> Iterator[tuple[int, Done]]:
        """(index, what came of it) for each batch."""
        waiting = deque(range(len(batches)))
        left = len(batches)
        while left:
            for connection, worker in self._workers.items():
                if worker.ready and worker.batch is None and waiting:
                    worker.batch = waiting.popleft()
                    with suppress(OSError):  # it was killed meanwhile; `_messages` tells
                        connection.send(batches[worker.batch])
            for connection, kind, content in self._messages():
                if kind == "gone":
                    if isinstance(content, int):
                        waiting.appendleft(content)
                elif kind == "done":
                    worker = self._workers[connection]
                    number, worker.batch = worker.batch, None
                    assert number is not None
                    left -= 1
                    yield number, content
                else:
                    self._hear(connection, kind, content)

    def _start(self, number: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        # A fresh interpreter: a fork would take over locks of threads that it does not have.
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, self._make, number, self._count), daemon=True
        )
        process.start()
        theirs.close()  # so that reading fails once the process is gone
        self._workers[ours] = _Worker(number, process)

    def _messages(self) -> list[tuple[Connection, str, Any]]:
        """What workers say, once any does. In place of one that is gone another is started."""
        said = []
        for connection in wait_for(list(self._workers)):
            assert isinstance(connection, Connection)
            try:
                said.append((connection, *connection.recv()))
            except (EOFError, OSError):
                said.append((connection, "gone", self._replace(connection)))
        return said

    def _replace(self, connection: Connection) -> int | None:
        """Start another process for one that is gone; the batch that it was at."""
        worker = self._workers.pop(connection)
        connection.close()
        worker.process.join()
        at = worker.batch
        if not worker.ready or at is not None:  # one that was idle has not died of anything that it did
            self._deaths[at] += 1
        if self._deaths[at] >= TRIES:
            when = "before they had answered anything" if at is None else "over the same pictures"
            how = f"the last with exit status {worker.process.exitcode}"
            raise InputError(f"{TRIES} workers ended {when}, {how}; is there memory for --workers {self._count}?")
        self._start(worker.number)
        return at

    def _hear(self, connection: Connection, kind: str, content: Any) -> None:
        if kind == "ready":
            run, facts = content
            if self.run and run != self.run:
                raise InputError("the workers do not run the same model: did its files change?")
            self.run, self.facts = run, facts
            self._workers[connection].ready = True
        elif kind == "refused":
            raise InputError(content)
        elif kind == "failed":
            raise RuntimeError(f"a worker failed:\n{content}")

    def _end(self) -> None:
        for connection, worker in self._workers.items():
            connection.close()
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join()
        self._workers.clear()


def _work(connection: Connection, make: Callable[[int, int], Answerer], number: int, count: int) -> None:
    """What a worker runs: it answers batches until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: one ends the others
    try:
        share_processor(count)
        answerer = make(number, count)
        connection.send(("ready", (answerer.run, answerer.facts)))
        while True:
            connection.send(("done", answerer(*connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # who asked is gone
    except TokenPruneError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))


def share_processor(count: int) -> None:
    """Leave this process its share of the cores: `count` processes with all threads each would be slower than one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // count)))
