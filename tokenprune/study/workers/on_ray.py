"""`OnRay`: workers on a Ray cluster."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenprune.errors import InputError
from tokenprune.study.workers.contract import Make, Said, Worker, answered, started
from tokenprune.study.workers.pool import Link, Pool

Given = TypeVar("Given")
Got = TypeVar("Got")


@dataclass(eq=False, kw_only=True)
class _Line(Link):
    actor: Any
    said: Any
    """Reference to what it says next; None while nothing is expected of it."""


class OnRay(Pool[Given, Got]):
    """As `Pool`, on a cluster: each worker is an actor, which keeps its model from one call of `answers` to the next.

    Args:
        make: a worker; model and files that it reads are found under the same paths on all machines.
        address: of a running cluster, such as ``auto`` or ``ray://HOST:10001``; ``local`` starts one on this machine.
        count: workers; None: as many as the cluster has GPUs, or else machines. A worker takes a GPU where there are
            any, else a core.

    Raises:
        InputError: also where Ray is not installed, or there is no cluster at `address`.
    """

    def __init__(self, make: Make[Given, Got], address: str, count: int | None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise InputError("--ray needs Ray: pip install 'tokenprune-vlm[ray]'") from None
        super().__init__(make, count or 0)
        self._address, self._ray = address, ray

    def _open(self) -> None:
        ray, more = self._ray, {"include_dashboard": False} if self._address == "local" else {}
        try:
            _knock(self._address)
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **more)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--ray {self._address}: no cluster: {' '.join(str(error).split())}") from None
        there = ray.cluster_resources()
        needs = {"num_gpus": 1} if there.get("GPU") else {"num_cpus": 1}
        room = int(there.get("GPU", 0) or there.get("CPU", 0))
        self._count = self._count or int(there.get("GPU", 0)) or len(ray.nodes())
        if self._count > room:
            raise InputError(f"--workers {self._count}: the cluster has room for {room}")
        self._actor = ray.remote(**needs)(_Actor)

    def _start(self, number: int) -> Link:
        actor = self._actor.remote()
        # Ray shows a worker its own GPU alone, so each takes the first that it sees.
        return _Line(number, actor=actor, said=actor.start.remote(self._make, self._count))

    def _send(self, link: Link, number: int, request: Given) -> None:
        assert isinstance(link, _Line)
        link.said = link.actor.answer.remote(number, request)

    def _messages(self) -> list[tuple[Link, str, Any]]:
        errors = self._ray.exceptions
        lines = {each.said: each for each in self._links if isinstance(each, _Line) and each.said is not None}
        (said,), _ = self._ray.wait(list(lines), num_returns=1)
        line = lines[said]
        line.said = None
        try:
            kind, content = self._ray.get(said)
        except errors.RayActorError as error:
            self._ray.kill(line.actor)  # one that is only out of reach would keep its core
            return [(line, "gone", f"the last so: {' '.join(str(error).split())[:200]}")]
        except errors.RayTaskError as error:  # outside of `started` and `answered`: what was sent cannot be read there
            told = str(error).strip().splitlines()[-1]
            raise InputError(
                f"--ray: a worker cannot read what it is sent ({told}); is the same version "
                "of tokenprune installed on all machines?"
            ) from None
        return [(line, kind, content)]

    def _close(self) -> None:
        self._links.clear()
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens at ``HOST:PORT``: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Actor:
    """What Ray keeps on a machine: a worker."""

    def __init__(self) -> None:
        self._worker: Worker[Any, Any] | None = None

    def start(self, make: Make[Any, Any], count: int) -> Said:
        # At least two: plug-ins of the command line are known in its own process alone.
        self._worker, said = started(make, 0, max(2, count))
        return said

    def answer(self, number: int, request: Any) -> Said:
        assert self._worker is not None
        return answered(self._worker, number, request)
