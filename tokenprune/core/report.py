"""`Report`: what really ran, filled by the forward itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.frames import frames_of
from tokenprune.core.grids import Grid, UnknownGrid
from tokenprune.core.stage_report import StageReport, json_seconds
from tokenprune.errors import NotFiredError

_SHOWN = 16
"""Frames whose counts are printed one by one."""


@dataclass
class Graphs:
    """What torch.compile made of an attached recipe so far."""

    compiled: int = 0
    """Graphs, one for each new shape."""
    breaks: int = 0
    """Places where a graph broke."""
    recompiles: int = 0
    """Of the graphs, those compiled for shapes that had one already."""
    calls: int = 0
    """Calls of compiled code."""

    def note(self, compiled: int, breaks: int, *, known: bool) -> None:
        """One call, which compiled so many graphs; `known` if its shapes had come before."""
        self.calls += 1
        self.compiled += compiled
        self.breaks += breaks
        self.recompiles += compiled if known else max(0, compiled - 1)


@dataclass(eq=False)
class Report:
    """What the stages of an attached recipe did in the last forward that brought vision tokens.

    A thread is told of its own forwards; one that has run none, of the last that any thread ran. Every attribute that
    tells a result raises `NotFiredError` as long as no such forward has run.
    """

    recipe: str
    fingerprint: str
    layers: int
    """Decoder layers of the model."""
    expected: int
    """Stages of the recipe."""
    graphs: Graphs | None = None
    """Counts of compiled code; None where nothing is compiled."""
    notes: tuple[str, ...] = ()
    """What the model gives otherwise than the recipe asks, in words: what stands in for a class token it lacks."""
    _threads: _Threads = field(default_factory=lambda: _Threads())
    _latest: _Run = field(default_factory=lambda: _Run())

    @property
    def _run(self) -> _Run:
        """What is told: of the calling thread, or of the last one that ran, where this one has run nothing."""
        return self._threads.own or self._latest

    def _own(self) -> _Run:
        """What the calling thread fills in."""
        if self._threads.own is None:
            self._threads.own = _Run()
        self._latest = self._threads.own
        return self._latest

    @property
    def prefills(self) -> int:
        """Forwards of this thread so far that brought vision tokens. Without a cache, generation makes one a token."""
        return self._run.prefills

    def begin(self, total: tuple[int, ...], grids: tuple[tuple[Grid, ...], ...], unrated: tuple[int, ...] = ()) -> None:
        """A forward with vision tokens starts."""
        run = self._own()
        run.total, run.grids, run.unrated, run.stages = total, grids, unrated, []
        run.complete, run.unseen = False, ""

    def finish(self, ran: list[StageReport]) -> None:
        """The forward is over, and these stages ran; raise `NotFiredError` unless they are all of the recipe."""
        run = self._own()
        run.stages = ran
        if len(ran) != self.expected:
            fired = ", ".join(stage.name for stage in ran) or "none"
            raise NotFiredError(
                f"recipe {self.recipe!r}: {self.expected} stages were attached, but only these ran: {fired}. "
                "Was the model compiled before attach, or are its layers called in another way?"
            )
        run.prefills += 1
        run.complete = True

    def forget(self, unseen: str) -> None:
        """A forward has run in which nobody could tell vision tokens, for the reason `unseen`."""
        run = self._own()
        run.complete, run.unseen = False, unseen

    def select(self, rows: Sequence[int]) -> None:
        """Turn the samples of the last forward into `rows` of them, as a batch that is repeated after its prefill."""
        run = self._need()
        run.total = tuple(run.total[row] for row in rows)
        run.grids = tuple(run.grids[row] for row in rows)
        run.unrated = tuple(number for number, row in enumerate(rows) if row in run.unrated)
        run.stages = [stage.select(rows) for stage in run.stages]

    @property
    def total(self) -> tuple[int, ...]:
        """Original vision tokens of each sample."""
        return self._need().total

    @property
    def grids(self) -> tuple[tuple[Grid, ...], ...]:
        """Per sample the (T, H, W) of each image, in vision tokens; an `UnknownGrid` where nothing tells."""
        return self._need().grids

    @property
    def unrated(self) -> tuple[int, ...]:
        """Samples that have no text token behind their first image, in a recipe with raters: in each, the last token of
        the prompt was the only rater."""
        return self._need().unrated

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """One entry a stage, in order."""
        return tuple(self._need().stages)

    @property
    def vision_tokens(self) -> Tensor:
        """``[B, layers]`` int64: vision tokens that entered each decoder layer."""
        return self._counts(stage for stage in self._need().stages if not stage.skips)

    @property
    def feed_forward_tokens(self) -> Tensor:
        """``[B, layers]`` int64: of `vision_tokens`, those that went through the feed-forward of each layer: fewer only
        behind a stage with ``dropped: skip_ffn``."""
        return self._counts(self._need().stages)

    def _counts(self, stages: Iterable[StageReport]) -> Tensor:
        """``[B, layers]`` vision tokens at each layer, where these stages are counted."""
        counts = torch.tensor(self._need().total).unsqueeze(1).repeat(1, self.layers)
        for stage in stages:
            counts[:, stage.layer or 0 :] = torch.tensor(stage.sizes).unsqueeze(1)
        return counts

    def by_frame(self, row: int = 0) -> tuple[tuple[int, ...], ...]:
        """For each stage, the tokens it has left in each picture, or each frame of a video, of a sample.

        Merged tokens count where their anchor lies; separators and class tokens lie nowhere. Tiles (LLaVA-NeXT) follow
        the overview of their picture.

        Raises:
            InputError: nothing tells where the vision tokens lie.
        """
        grids = self.grids[row]
        planes = frames_of(grids, asker="report")
        counts = []
        for stage in self.stages:
            left = stage.left[row].tolist()
            counts.append(tuple(int(plane.mask(left).sum()) for plane in planes))
        return tuple(counts)

    @property
    def seconds(self) -> float:
        """Time of the method in all stages; NaN in a compiled forward."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        counts = self.vision_tokens
        fed = self.feed_forward_tokens
        skips = any(stage.skips for stage in self.stages)
        return {
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "prefills": self.prefills,
            "total": list(self.total),
            "unrated": list(self.unrated),
            "vision_tokens": counts.tolist(),
            "average": counts.double().mean(1).tolist(),
            "final": counts[:, -1].tolist(),
            **({"feed_forward_tokens": fed.tolist()} if skips else {}),
            "stages": [stage.to_dict() for stage in self.stages],
            "seconds": json_seconds(self.seconds),
            "notes": list(self.notes),
            "graphs": None if self.graphs is None else asdict(self.graphs),
        }

    def __str__(self) -> str:
        run = self._run
        if not run.complete:
            reason = run.unseen or "no image has come through"
            return f"recipe {self.recipe} ({self.fingerprint}): {reason}, so nothing was reduced"
        counts, fed = self.vision_tokens, self.feed_forward_tokens
        seconds = self.seconds
        spent = "" if math.isnan(seconds) else f", time of the method {1000 * seconds:.1f} ms"
        lines = [f"recipe {self.recipe} ({self.fingerprint}){spent}"]
        if self.graphs is not None:
            lines.append(
                "compiled: {compiled} graphs, {breaks} breaks, {recompiles} recompiles".format(**vars(self.graphs))
            )
        lines += [f"note: {note}" for note in self.notes]
        for row, total in enumerate(run.total):
            rated = ", no text behind the picture: its last token rated" if row in run.unrated else ""
            lines.append(f"sample {row}: {total} vision tokens{rated}")
            frames = self._frames(row)
            for number, stage in enumerate(run.stages):
                merged = int((stage.merged[row] >= 0).sum())
                kept = stage.sizes[row] - merged
                tail = f" + {merged} merged" if merged else ""
                if stage.skips:
                    tail += f", {counts[row, -1] - stage.sizes[row]} skip the feed-forward and leave the caches"
                lines.append(f"  {stage.place:<18} (layer {stage.layer or 0}): {kept} kept{tail}")
                lines += frames[number : number + 1]
            mean = counts[row].double().mean().item()
            share = f" = {mean / total:.1%}" if total else ""
            told = f"{mean:.1f}{share}, final {int(counts[row, -1])}"
            if any(stage.skips for stage in run.stages):
                through = fed[row].double().mean().item()
                told += f"; through feed-forwards {through:.1f}{f' = {through / total:.1%}' if total else ''}"
            lines.append(f"  average over {self.layers} layers {told}")
        return "\n".join(lines)

    def _frames(self, row: int) -> list[str]:
        """A line for each stage that tells its counts by frame; none for a single picture, or where nothing tells."""
        grids = self.grids[row]
        if sum(t for t, _, _ in grids) < 2 or any(isinstance(grid, UnknownGrid) for grid in grids):
            return []
        what = "frames" if any(t > 1 for t, _, _ in grids) else "pictures"
        lines = []
        for counts in self.by_frame(row):
            told = " ".join(map(str, counts)) if len(counts) <= _SHOWN else f"{min(counts)} to {max(counts)} each"
            lines.append(f"    in {len(counts)} {what}: {told}")
        return lines

    def _need(self) -> _Run:
        run = self._run
        if not run.complete:
            reason = run.unseen or "no forward with vision tokens has completed"
            raise NotFiredError(f"recipe {self.recipe!r} is attached, but {reason}: nothing to report")
        return run

    def __getstate__(self) -> dict[str, Any]:
        """A copy tells what this thread is told."""
        return {**vars(self), "_threads": None, "_latest": self._run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _threads=_Threads())


@dataclass(eq=False)
class _Run:
    """The last forward with vision tokens of one thread."""

    prefills: int = 0
    total: tuple[int, ...] = ()
    grids: tuple[tuple[Grid, ...], ...] = ()
    unrated: tuple[int, ...] = ()
    stages: list[StageReport] = field(default_factory=list)
    complete: bool = False
    unseen: str = ""
    """Why nothing is known of a later forward."""


class _Threads(threading.local):
    """What each thread has run."""

    own: _Run | None = None
