"""`--workers` and `--ray`: the processes that answer, and what each of them loads."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat
    from tokenprune.families.load import Kernel
    from tokenprune.study.evaluate import Request, Respondent, Response
    from tokenprune.study.workers import Make, Opened

WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes that share the batches, each with its own model.", metavar="N")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        help="Spread the batches over a Ray cluster: its address, auto, or local. --workers: as many as it has GPUs, "
        "or machines, where not given. Needs the extra 'ray'.",
        metavar="ADDRESS",
    ),
]
Given = TypeVar("Given")
Got = TypeVar("Got")


@dataclass(frozen=True)
class Loading:
    """What a process loads, as plain data: it travels to other processes."""

    model: str
    dtype: str | None
    device: str | None
    attention: Kernel
    plugins: Sequence[Path] = ()

    def anywhere(self) -> Loading:
        """The same with whole paths: workers elsewhere do not start in this folder."""
        plugins = tuple(path.resolve() for path in self.plugins)
        return replace(self, model=whole(self.model), plugins=plugins)

    def __call__(self, number: int, count: int) -> Chat:
        """The model of worker `number` of `count`; until its process ends, recipes may name the plug-ins' parts."""
        from tokenprune.answers import load
        from tokenprune.registry import trying

        if count > 1:  # the command itself has the plug-ins already, and a name can be given once
            plugins = ExitStack()
            plugins.enter_context(trying(self.plugins))
            atexit.register(plugins.close)
        device = device_of(self.device, number, _gpus())
        return load(self.model, dtype=self.dtype, device=device, attention=self.attention)


@dataclass(frozen=True)
class Responding:
    """How a process that evaluates gets its model. Plain data."""

    loading: Loading

    def __call__(self, number: int, count: int) -> Respondent:
        """The worker of `eval` and `tune`."""
        from tokenprune.study.evaluate import Respondent

        return Respondent(self.loading(number, count))


def respondents(loading: Loading, workers: int | None, ray: str | None) -> Opened[Request, Response]:
    """Those who answer what `eval` and `tune` ask; to be entered."""
    make = Responding(loading if ray is None else loading.anywhere())
    return workers_of(make, workers, ray)


def whole(name: str) -> str:
    """A path in full; names of models and recipes as they are."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def workers_of(make: Make[Given, Got], workers: int | None, ray: str | None) -> Opened[Given, Got]:
    """This process, several, or a cluster; to be entered.

    Args:
        make: a worker; on a cluster it is to be one for `anywhere`.
        workers: how many; None is one, and on a cluster as many as fit.
        ray: address of the cluster.
    """
    from tokenprune.study.workers import Alone, OnRay, Processes

    if ray is not None:
        return OnRay(make, ray, workers)
    return Alone(make) if workers in (None, 1) else Processes(make, workers)


def device_of(device: str | None, number: int, gpus: int) -> str | None:
    """The device of worker `number`: where several GPUs are meant, the workers take them in turn."""
    return f"cuda:{number % gpus}" if gpus > 1 and number > 0 and device in (None, "cuda") else device


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
