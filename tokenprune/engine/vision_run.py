"""A run of a vision tower: its pictures, what stages have left of them, and the way back to the untouched grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.grids import Grid, cells_of, square_or_row
from tokenprune.core.merge import Merge, unmerge
from tokenprune.core.signals import Question
from tokenprune.core.stage_report import StageReport
from tokenprune.core.tokens import Tokens
from tokenprune.engine.calls import bound, takes
from tokenprune.errors import InputError
from tokenprune.families.tower import Tower


@dataclass(eq=False)
class Run:
    """One run of a tower."""

    grid: Tensor | None
    """``[pictures, 3]`` frames, rows and columns of patches; None where the tower is not told them."""
    pixels: Any = None
    """What it was called with."""
    real: Tensor | None = None
    """``[patches]`` index, picture behind picture, of the real patches in rows that are padded to the most; None where
    pictures are not rows, or nothing is padding."""
    values: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Signals by name, ``[patches, ...]`` of all its pictures, computed when a prompt asks for them."""
    reduction: Reduction | None = None
    """What stages have made of it."""

    @property
    def packed(self) -> bool:
        """Whether all pictures stand in one sequence; else each is a row."""
        return self.grid is not None and self.real is None

    def pictures(self) -> list[int] | None:
        """Patches of each frame, in order; None where nothing is packed."""
        if not self.packed:
            return None
        assert self.grid is not None
        return [rows * columns for frames, rows, columns in self.grid.tolist() for _ in range(frames)]


def run_of(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """The run that a call of the tower starts."""
    call = bound(tower, args, kwargs)
    pixels = args[0] if args else kwargs.get("pixel_values")
    if isinstance(grid := call.get("grid_thw"), Tensor):
        return Run(grid, pixels)
    patch = _patch_sides(tower)
    if takes(tower, "image_sizes") and isinstance(pixels, Tensor) and patch is not None:  # Pixtral's
        sizes = call.get("image_sizes")
        sizes = [pixels.shape[2:]] * len(pixels) if sizes is None else torch.as_tensor(sizes).tolist()
        return Run(torch.tensor([(1, rows // patch[0], columns // patch[1]) for rows, columns in sizes]), pixels)
    shapes = call.get("spatial_shapes")
    if isinstance(shapes, Tensor) and isinstance(pixels, Tensor):  # Siglip 2's: rows of patches, in raster order
        index, shapes = torch.arange(pixels.shape[1]), shapes.cpu()
        places = torch.stack([index % shapes[:, 1:], index // shapes[:, 1:]], -1)
        places[index >= shapes.prod(1, keepdim=True)] = -1
        return _padded(places, pixels)
    if isinstance(given := call.get("pixel_position_ids"), Tensor):  # Gemma 4's
        return _padded(given.cpu(), pixels)
    return Run(None, pixels)


def _padded(places: Tensor, pixels: Any) -> Run:
    """A run over rows of patches, from the column and row ``[R, n, 2]`` of each; -1 on padding."""
    columns, rows = places.unbind(-1)
    order = (rows * (1 + columns.max()) + columns).masked_fill(rows < 0, torch.iinfo(torch.int64).max)
    counts = (rows >= 0).sum(1).tolist()
    first = range(0, places.shape[0] * places.shape[1], places.shape[1])
    each = [start + own.argsort()[:count] for start, own, count in zip(first, order, counts, strict=True)]
    grid = torch.stack([torch.ones_like(rows[:, 0]), rows.amax(1) + 1, columns.amax(1) + 1], 1)
    return Run(grid, pixels, torch.cat(each))


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
    packed: bool
    """Whether all pictures stand in one sequence, ``[n, D]`` or ``[1, n, D]``."""
    rows: Tensor | None = None
    """Rows of the sequence that the blocks run on, ``[n]`` of a packed one, else ``[R, n]``; None: all."""
    filled: Tensor | None = None
    """``[R, n]`` bool, rows that fill up a picture of fewer tokens, which nobody may see; None where there are none."""
    levels: list[Level] = field(default_factory=list)
    gone: dict[int, Tensor] = field(default_factory=dict)
    """For each stage by number, ``[patches, 2]`` float32: 1 where a patch is no longer there; what it stands for."""
    full: Tensor | None = None
    """Of the running block: the states of all rows."""
    report: list[StageReport] = field(default_factory=list)

    def patches(self, hidden: Tensor) -> Tensor:
        """``[patches, D]`` of the whole sequence, a copy: what leaves a block may be recorded elsewhere."""
        return hidden.clone() if hidden.dim() == 2 else hidden[:, self.tower.prefix :].flatten(0, 1).clone()

    def whole(self, patches: Tensor, like: Tensor) -> Tensor:
        """The inverse of `patches`; what stands in front of them is that of `like`."""
        if like.dim() == 2:
            return patches
        front = like[:, : self.tower.prefix]
        return torch.cat([front, patches.unflatten(0, (like.shape[0], -1))], dim=1)

    def biases(self) -> Tensor | None:
        """``[R, n]`` what is added to the attention that each row of the sequence gets; 0 in front of patches."""
        tokens = self.tokens
        if tokens.bias is None:
            return None
        assert self.rows is not None
        each = torch.zeros(len(self.gone[max(self.gone)]), device=tokens.bias.device)
        each[self.units[tokens.slot[tokens.valid]]] = tokens.bias[tokens.valid][:, None]
        if self.packed:
            return each[self.rows][None]
        full = torch.nn.functional.pad(each.view(self.rows.shape[0], -1), (self.tower.prefix, 0))
        return full.gather(1, self.rows)

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
        hidden: ``[R, n, D]``, a picture a row; ``[n, D]`` or ``[1, n, D]`` packed.
        run: what it was called with.
        reorder: as in `VisionStages`.

    Raises:
        InputError: the rows are no whole pictures.
    """
    side, device = tower.side, hidden.device
    if run.grid is not None:
        grids: list[Grid] = [(t, h // side, w // side) for t, h, w in run.grid.tolist()]
        count = hidden.shape[-2] if run.real is None else len(run.real)
    else:
        each = hidden.shape[1] - tower.prefix
        grids = [_picture(tower, each, run.pixels)] * hidden.shape[0]
        count = hidden.shape[0] * each
    sizes = tuple(math.prod(one) for one in grids)
    if sum(sizes) * side**2 != count:
        raise InputError(f"{type(tower.module).__name__}: {count} patches are no whole pictures of {grids}")
    units = reorder(tower.units(grids).to(device), run.grid)
    units = units if run.real is None else run.real.to(device)[units]
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
    return Reduction(tower, units, tokens, packed=run.packed)


def _picture(tower: Tower, patches: int, pixels: Any) -> Grid:
    """The grid of a picture with so many patches: from the pixels, where the configuration tells the patch's size."""
    side = tower.side
    patch = _patch_sides(tower.module)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and patch is not None:
        rows, columns = pixels.shape[2] // patch[0], pixels.shape[3] // patch[1]
        if rows * columns == patches:
            return (1, rows // side, columns // side)
    return square_or_row(patches // side**2)


def _patch_sides(module: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch in pixels; None where the tower's configuration does not tell."""
    size = getattr(getattr(module, "config", None), "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
