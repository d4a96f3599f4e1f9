"""What the two benchmarks share: cells that are measured once and kept, and the facts of the machine."""

from __future__ import annotations

import ctypes
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from cut import cut, lengths
from transformers import PreTrainedModel

from tokenprune.engine.cache import cache_in
from tokenprune.errors import TokenPruneError
from tokenprune.families.noise import usual_pictures
from tokenprune.recipe import Recipe
from tokenprune.study.bench.clock import Sample
from tokenprune.study.bench.result import SideRow
from tokenprune.study.bench.rounds import measure
from tokenprune.study.bench.sides import UNTOUCHED, Compile, Side, check_kernels, open_side
from tokenprune.study.statistics import median_ratio

CUT = "cut like {}"
"""Name of the side that tells what the machine allows a recipe."""


class Results:
    """A JSON file of cells. A cell that is there is not measured again, unless the settings have changed."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.cells: dict[str, Any] = {}
        if path.exists():
            before = json.loads(path.read_text())
            if before["settings"] == settings:
                self.cells = before["cells"]

    def add(self, name: str, run: Callable[[], Any]) -> None:
        """Measure a cell and write the file, or tell why there is no number."""
        if name in self.cells and "skipped" not in self.cells[name]:
            print(f"{name}: kept", flush=True)
        else:
            self.replace(name, run)

    def replace(self, name: str, run: Callable[[], Any]) -> None:
        """The same, whether the cell is there or not."""
        start = time.perf_counter()
        try:
            found = {"rows": run()}
        except (torch.OutOfMemoryError, TokenPruneError) as error:
            found = {"skipped": str(error).splitlines()[0]}
        found["seconds"] = round(time.perf_counter() - start, 1)  # of the last measurement
        self.cells[name] = found
        facts = {"settings": self.settings, "machine": machine(), "cells": self.cells}
        self.path.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{name}: {found['seconds']} s", found.get("skipped", ""), flush=True)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: else each large intermediate result is paid for in page faults, over and over.

    What PyTorch's tuning guide asks of another allocator (jemalloc, TCMalloc). It makes every side faster.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise SystemExit("these benchmarks tune glibc's allocator, which this system does not have")
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, size in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
        if not mallopt(option, size):
            raise SystemExit(f"glibc refused mallopt({option}, {size})")


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Quiet:
    """Waits for a quiet machine, by how long products of a fixed size take: its host may have other guests.

    The same wait stands before every run, whichever side's; after `patience` seconds the run begins in any case. Quiet
    is what the fastest tenth of the first products was, and a little slower.
    """

    tolerance = 1.15
    patience = 15.0

    def __init__(self) -> None:
        self.rows, self.weight = torch.randn(640, 1024), torch.randn(1024, 1024)
        self.usual = sorted(self._seconds() for _ in range(100))[10]
        self.noisy = 0
        """Runs that began without it."""

    def wait(self, runs: int = 1) -> None:
        """`measure` calls it behind every run, with the number of runs."""
        start = time.perf_counter()
        while self._seconds() > self.tolerance * self.usual:
            if time.perf_counter() - start > self.patience:
                self.noisy += 1
                return

    @torch.inference_mode()
    def _seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(self.rows, self.weight)
        return time.perf_counter() - start


def compare(
    model: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    *,
    tokens: int,
    text: int,
    batch: int = 1,
    new_tokens: int = 1,
    rounds: int,
    compile: Compile = False,
    quiet: Quiet | None = None,
    limits: Sequence[str] = (),
    cache: bool = False,
    earlier: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Rows of the untouched model and of every recipe, all in the same rounds.

    With phases in `limits` (``prefill``, ``language``), each recipe's row also tells what the machine allows there
    (cut.py), measured in these rounds, too. With `cache`, each row tells the bytes that the cache of a prefill really
    takes. The rounds of `earlier` rows of the same sides count as well.
    """
    pictures = usual_pictures(model.config, tokens)
    with ExitStack() as stack:
        running = [open_side(stack, UNTOUCHED, model, pictures, compile=compile)]
        for name, recipe in recipes.items():
            running.append(open_side(stack, name, model, pictures, recipe, compile=compile))
        for name, recipe in recipes.items() if limits else ():
            side = open_side(stack, CUT.format(name), model, pictures, compile=compile)
            cut(side.model, lengths(recipe, len(side.model.model.language_model.layers), pictures, text))
            running.append(side)
        check_kernels(running, model)
        on_run = None if quiet is None else quiet.wait
        rows = measure(running, text, batch, new_tokens, rounds, warmup=2 if compile else 1, on_run=on_run)
        caches = {side.name: cache_bytes(side, text, batch) for side in running} if cache else {}
    new, before = {row.name: row for row in rows}, {row["name"]: row for row in earlier}
    told = []
    for name in (UNTOUCHED, *recipes):
        row = replace(
            new[name],
            samples=(*_samples(before, name), *new[name].samples),
            untouched=(*_samples(before, UNTOUCHED), *new[name].untouched),
        )
        told.append(row.to_dict())
        if cache:
            told[-1]["cache_bytes"] = {"measured": caches[name], "ledger": batch * row.reduced.kv_bytes}
        if limits and name != UNTOUCHED:
            known = before[name]["machine"] if before else {phase: {"samples": []} for phase in limits}
            free = new[CUT.format(name)].samples
            told[-1]["machine"] = {phase: _limit(row, phase, known[phase]["samples"], free) for phase in limits}
    return told


@torch.inference_mode()
def cache_bytes(side: Side, text: int, batch: int) -> int:
    """Bytes of device memory that the keys and values of a prefill keep from being freed."""
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    inputs = side.prompt(text=text, batch=batch)
    made = side.model.generate(**inputs, **options, return_dict_in_generate=True)
    stores = [each.untyped_storage() for layer in cache_in(made).layers for each in (layer.keys, layer.values)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def _samples(rows: Mapping[str, dict[str, Any]], name: str) -> list[Sample]:
    return [Sample(**sample) for sample in rows[name]["samples"]] if rows else []


def _limit(row: SideRow, phase: str, earlier: list[float], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the machine allows a method that costs nothing, and how fast a row is beside it; paired by round."""
    untouched, own, free = ([getattr(one, phase) for one in side] for side in (row.untouched, row.samples, samples))
    free = [*earlier, *free]
    return {
        "allows": median_ratio(untouched, free).to_dict(),
        "reached": median_ratio(free, own).to_dict(),
        "samples": free,
    }
