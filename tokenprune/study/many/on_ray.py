"""`OnRay`: the batches of `run --images` on a cluster, by Ray Data."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from tokenprune.errors import InputError, TokenPruneError
from tokenprune.study.many.answerer import Answerer, Done
from tokenprune.study.many.batches import Line, digest
from tokenprune.study.many.pool import Batch, Make

ONE_OF_SEVERAL = 2
"""What an answerer is told of how many there are: it is not this process, which has its plug-ins already."""


class OnRay:
    """Workers on a Ray cluster, each with an answerer of its own; batches come back as they are done.

    Only this process writes. A worker or a machine that is lost costs the batch that it was at: Ray asks it again
    elsewhere. Pictures are read where the workers run, under the same paths, and are checked to be the same files.

    Args:
        make: the answerer of a worker.
        address: of a running cluster, such as ``auto`` or ``ray://HOST:10001``; ``local`` starts one on this machine.
        count: workers; None: as many as the cluster has GPUs, or else machines. A worker takes a GPU where there are
            any, else a core.

    Raises:
        InputError: Ray is not installed, there is no cluster at `address`, or, on entering, what `make` raised.
    """

    def __init__(self, make: Make, address: str, count: int | None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise InputError("--ray needs Ray: pip install 'tokenprune-vlm[ray]'") from None
        self._make, self._address, self._count, self._ray = make, address, count, ray
        self.run = ""
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> OnRay:
        ray = self._ray
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"--ray {self._address}: no cluster: {' '.join(str(error).split())}") from None
        try:
            there = ray.cluster_resources()
            self._needs = {"num_gpus": 1} if there.get("GPU") else {"num_cpus": 1}
            self._count = self._count or int(there.get("GPU", 0)) or len(ray.nodes())
            room = int(there.get("GPU", 0) or there.get("CPU", 0))
            if self._count > room:
                raise InputError(f"--workers {self._count}: the cluster has room for {room}")
            told, refused = ray.get(ray.remote(**self._needs)(_facts).remote(self._make))
            if refused is not None:
                raise InputError(refused)
            self.run, self.facts = told
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def answers(self, batches: Sequence[Batch]) -> Iterator[tuple[int, Done]]:
        """(index, what came of it) for each batch."""
        from ray import data

        if not batches:
            return
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False  # the command has a bar of its own
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        whole = [([replace(line, path=line.path.resolve()) for line in lines], measure) for lines, measure in batches]
        rows = [{"number": number, "batch": pickle.dumps(batch)} for number, batch in enumerate(whole)]
        workers = data.ActorPoolStrategy(size=self._count)
        asked = data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker, fn_constructor_args=(self._make, self.run), compute=workers, **self._needs
        )
        for row in asked.iter_rows():
            done, refused = pickle.loads(row["done"])
            if refused is not None:
                raise InputError(refused)
            yield row["number"], done


def _facts(make: Make) -> tuple[tuple[str, dict[str, Any]] | None, str | None]:
    """What is run, and where; or why it is refused."""
    try:
        answerer = make(0, ONE_OF_SEVERAL)
    except TokenPruneError as error:
        return None, str(error)
    return (answerer.run, answerer.facts), None


class _Worker:
    """What Ray Data keeps on a worker: an answerer."""

    def __init__(self, make: Make, run: str) -> None:
        self._answerer: Answerer = make(0, ONE_OF_SEVERAL)
        same = self._answerer.run == run
        self._other = None if same else "the workers do not run the same model: did its files change?"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        lines, measure = pickle.loads(row["batch"])
        try:
            refused = self._other or _strange(lines)
            done = None if refused else self._answerer(lines, measure)
        except TokenPruneError as error:
            done, refused = None, str(error)
        return {"number": row["number"], "done": pickle.dumps((done, refused))}


def _strange(lines: Sequence[Line]) -> str | None:
    """Why a picture is not the one that was asked about; None where all are."""
    for line in lines:
        try:
            same = digest(line.path) == line.digest
        except OSError as error:
            told = f"{line.path} cannot be read by a worker ({error.strerror})"
            return f"{told}; are the pictures on a disk that all machines share?"
        if not same:
            return f"{line.path} is another file where a worker runs, or has changed since"
    return None
