"""A run of a vision tower: its pictures, what stages have left of them, and the way back to the untouched grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.merge import Merge, unmerge
from tokenprune.core.report import StageReport
from tokenprune.core.signals import Question
from tokenprune.core.tokens import Grid, Tokens, square_or_row
from tokenprune.engine.grids import cells_of
from tokenprune.errors import InputError
from tokenprune.families.tower import Tower


@dataclass(eq=False)
class Run:
    """One run of a tower."""

    grid: Tensor | None
    """``[pictures, 3]`` frames, rows and columns of patches; None where the tower takes pictures as they are."""
    pixels: Any = None
    """What it was called with."""
    values: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Signals by name, ``[patches, ...]`` of all its pictures, computed when a prompt asks for them."""
    reduction: Reduction | None = None
    """What stages have made of it."""

    def pictures(self) -> list[int] | None:
        """Patches of each frame, in order; None where nothing is packed."""
        if self.grid is None:
            return None
        return [rows * columns for frames, rows, columns in self.grid.tolist() for _ in range(frames)]


def run_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """The run that a call of the tower starts."""
    grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
    packed = isinstance(grid, Tensor) and grid.dim() == 2 and grid.shape[1] == 3
    return Run(grid if packed else None, args[0] if args else kwargs.get("pixel_values"))


class Pictured:
    """Runs of the tower whose pictures belong to the present prompt of a thread."""

    def __init__(self) -> None:
        self.batch: int | None = None
        """Samples of the running `generate` call, before beams and several answers make more rows of each."""
        self.clear()

    def clear(self) -> None:
        """Forget all pictures."""
        self.runs: list[Run] = []
        self.consumed = False
        """Whether a prompt has had them: the next run brings new ones."""
        self.sizes: Any = None
        """``image_sizes`` of the call."""

    def base_begins(self, kwargs: dict[str, Any]) -> None:
        """The base model is called: outside `generate`, the pictures of its prompt are those that come from now on."""
        if self.batch is None:
            self.clear()
        if kwargs.get("image_sizes") is not None:
            self.sizes = kwargs["image_sizes"]

    def add(self, run: Run) -> None:
        """The tower begins to run."""
        if self.consumed:  # the pictures of a later turn, or of the next step without a cache
            self.runs, self.consumed = [], False
        self.runs.append(run)

    @property
    def running(self) -> Run | None:
        """The run that began last."""
        return self.runs[-1] if self.runs else None


@dataclass(frozen=True, eq=False)
class Level:
    """What one stage has done, for the way back."""

    slot: Tensor
    """``[B, N]`` units that came in, by index into `Reduction.units`."""
    valid: Tensor
    """``[B, N]`` bool."""
    left: Tensor
    """``[B, K]`` which of them are left, -1 on padding."""
    plan: Merge | None


@dataclass(eq=False)
class Reduction:
    """The pictures of one run of a tower, as far as stages have reduced them."""

    tower: Tower
    units: Tensor
    """``[U, side²]`` patches of each future vision token, by place among all patches of the run."""
    tokens: Tokens
    """What is left of each picture; `slot` is an index into `units`, `hidden` is stale."""
    rows: Tensor | None = None
    """Rows of the sequence that the blocks run on, ``[n]`` of a packed one, else ``[R, n]``; None: all."""
    levels: list[Level] = field(default_factory=list)
    gone: dict[int, Tensor] = field(default_factory=dict)
    """For each stage by number, ``[patches, 2]`` float32: 1 where a patch is no longer there; what it stands for."""
    full: Tensor | None = None
    """Of the running block: the states of all rows."""
    report: list[StageReport] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        """Whether all pictures stand in one sequence ``[n, D]``."""
        return self.full is not None and self.full.dim() == 2

    def patches(self, hidden: Tensor) -> Tensor:
        """``[patches, D]`` of the whole sequence, a copy: what leaves a block may be recorded elsewhere."""
        if hidden.dim() == 2:
            return hidden.clone()
        own = hidden[:, self.tower.prefix :]
        return own.clone(memory_format=torch.contiguous_format).flatten(0, 1)  # of one picture, flat alone is a view

    def whole(self, patches: Tensor, like: Tensor) -> Tensor:
        """The inverse of `patches`; what stands in front of them is that of `like`."""
        if like.dim() == 2:
            return patches
        front = like[:, : self.tower.prefix]
        return torch.cat([front, patches.unflatten(0, (like.shape[0], -1))], dim=1)

    def restored(self, full: Tensor) -> Tensor:
        """The whole grid again: merged patches get what their target has become."""
        if all(level.plan is None for level in self.levels):
            return full
        patches = self.patches(full)
        for level in reversed(self.levels):
            if level.plan is None:
                continue
            states = patches[self.units[level.slot]]
            there = level.left.clamp(min=0)[..., None, None].expand(-1, -1, *states.shape[2:])
            back = unmerge(states.gather(1, there), level.left, level.plan, states.shape[1])
            ones = torch.ones(*level.left.shape, 1, device=states.device)
            flows = (unmerge(ones, level.left, level.plan, states.shape[1])[..., 0] > 0) & level.valid
            patches[self.units[level.slot[flows]]] = back[flows]
        return self.whole(patches, full)


def begin(tower: Tower, hidden: Tensor, run: Run, reorder: Callable[[Tensor, Tensor | None], Tensor]) -> Reduction:
    """The pictures of a run, before any stage, from what enters the first block that a stage stands before.

    Args:
        tower: which runs.
        hidden: ``[R, n, D]``, a picture a row, or ``[n, D]`` packed.
        run: what it was called with.
        reorder: as in `VisionStages`.

    Raises:
        InputError: the rows are no whole pictures.
    """
    side, device = tower.side, hidden.device
    if hidden.dim() == 2:
        assert run.grid is not None
        grids: list[Grid] = [(t, h // side, w // side) for t, h, w in run.grid.tolist()]
        count = hidden.shape[0]
    else:
        each = hidden.shape[1] - tower.prefix
        grids = [_picture(tower, each, run.pixels)] * hidden.shape[0]
        count = hidden.shape[0] * each
    sizes = tuple(math.prod(one) for one in grids)
    if sum(sizes) * side**2 != count:
        raise InputError(f"{type(tower.module).__name__}: {count} patches are no whole pictures of {grids}")
    units = reorder(tower.units(grids).to(device), run.grid)
    most = max(sizes)
    index = torch.arange(most, device=device).expand(len(sizes), -1)
    counted = torch.tensor(sizes, device=device)
    valid = index < counted[:, None]
    origin = index.masked_fill(~valid, -1)
    slot = (index + (counted.cumsum(0) - counted)[:, None]).masked_fill(~valid, 0)
    each_grid = tuple((one,) for one in grids)
    tokens = Tokens(
        hidden=hidden.new_zeros(len(sizes), most, hidden.shape[-1]),
        valid=valid,
        origin=origin,
        slot=slot,
        cell=cells_of(each_grid, most).to(device),
        position=origin.clamp(min=0),
        mass=valid.float(),
        question=Question(hidden.new_zeros(len(sizes), 0, hidden.shape[-1]), valid[:, :0], False),
        sizes=sizes,
        total=sizes,
        grids=each_grid,
    )
    return Reduction(tower, units, tokens)


def _picture(tower: Tower, patches: int, pixels: Any) -> Grid:
    """The grid of a picture with so many patches: from the pixels, where the configuration tells the patch's size."""
    side = tower.side
    size = getattr(getattr(tower.module, "config", None), "patch_size", None)
    down, right = size if isinstance(size, list | tuple) else (size, size)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and down and right:
        rows, columns = pixels.shape[2] // down, pixels.shape[3] // right
        if rows * columns == patches:
            return (1, rows // side, columns // side)
    return square_or_row(patches // side**2)
