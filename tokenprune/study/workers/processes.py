"""`Processes`: workers on this machine, each a process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tokenprune.errors import InputError
from tokenprune.study.workers.contract import answered, started
from tokenprune.study.workers.pool import Link, Pool

Given = TypeVar("Given")
Got = TypeVar("Got")


@dataclass(eq=False, kw_only=True)
class _Line(Link):
    connection: Connection
    process: BaseProcess


class Processes(Pool[Given, Got]):
    """As `Pool`, in processes of this machine. They end by themselves when this one does.

    Raises:
        InputError: also where `make` or a request cannot be pickled.
    """

    def _open(self) -> None:
        _pickled("what loads the model", self._make)

    def _start(self, number: int) -> Link:
        ours, theirs = multiprocessing.Pipe()
        # A fresh interpreter: a fork would take over locks of threads that it does not have.
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, self._make, number, self._count), daemon=True
        )
        process.start()
        theirs.close()  # so that reading fails once the process is gone
        return _Line(number, connection=ours, process=process)

    def _send(self, link: Link, number: int, request: Given) -> None:
        told = _pickled("a request", (number, request))
        assert isinstance(link, _Line)
        with suppress(OSError):  # it was killed meanwhile; `_messages` tells
            link.connection.send_bytes(told)

    def _messages(self) -> list[tuple[Link, str, Any]]:
        lines = {each.connection: each for each in self._links if isinstance(each, _Line)}
        said: list[tuple[Link, str, Any]] = []
        for connection in wait_for(list(lines)):
            assert isinstance(connection, Connection)
            line = lines[connection]
            try:
                said.append((line, *connection.recv()))
            except (EOFError, OSError):
                connection.close()
                line.process.join()
                said.append((line, "gone", f"the last with exit status {line.process.exitcode}"))
        return said

    def _close(self) -> None:
        lines = [each for each in self._links if isinstance(each, _Line)]
        for line in lines:
            line.connection.close()
            line.process.terminate()
        for line in lines:
            line.process.join()
        self._links.clear()


def _pickled(what: str, content: object) -> bytes:
    """The bytes that another process reads.

    Raises:
        InputError: it holds something that no other process can find.
    """
    try:
        return pickle.dumps(content)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        told = "give functions of a module and files in place of lambdas and open things"
        raise InputError(f"{what} cannot be sent to another process ({error}): {told}") from None


def _work(connection: Connection, make: Callable[[int, int], Any], number: int, count: int) -> None:
    """What a worker's process runs: it answers requests until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: one ends the others
    share_processor(count)
    worker, said = started(make, number, count)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # who asked is gone
        connection.send(said)
        while worker is not None:
            connection.send(answered(worker, *connection.recv()))


def share_processor(count: int) -> None:
    """Leave this process its share of the cores: `count` processes with all threads each would be slower than one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // count)))
