"""Stages inside a vision tower: from a stage's block on, blocks run on the patches that it has left.

Outside the blocks everything keeps the untouched grid. A hook before each block takes out the rows that are left, one
behind it puts them back: a dropped patch keeps the state that it had, a merged one gets what its target has become.
So whatever reads the tower (projector, merger, DeepStack, a dense head) finds every patch at its place.

A token of a stage is what will be a vision token: where a projector merges 2 x 2 patches, all four stay or go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenprune.core.grids import Grid
from tokenprune.core.merge import merge
from tokenprune.core.stage_report import StageReport
from tokenprune.core.tokens import Tokens
from tokenprune.engine.calls import bound, names, takes
from tokenprune.engine.traces import Handle, post_hook, pre_hook
from tokenprune.engine.vision_run import Level, Reduction, Run, begin
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.tower import Tower
from tokenprune.stage import Stage


class VisionStages:
    """Runs stages inside `tower`; `mount` adds the hooks.

    Args:
        tower: whose blocks.
        stages: those of a pipeline that act there, by their number.
        running: the tower's present run; None where it does not run.
        reorder: future vision tokens ``[U, ...]`` from the order of the tower to that of the grid in its call.
        plan: how many tokens each stage keeps of a picture of this grid (`Pipeline.picture_plan`).

    Raises:
        UnsupportedModelError: the tower has no such block, or the stage asks what towers cannot do.
    """

    def __init__(
        self,
        tower: Tower,
        stages: dict[int, Stage],
        running: Callable[[], Run | None],
        reorder: Callable[[Tensor, Tensor | None], Tensor],
        plan: Callable[[Grid], Sequence[int | None]],
    ) -> None:
        self.tower = tower
        self.plan = plan
        self.stages = stages
        self.running = running
        self.reorder = reorder
        self.at: dict[int, list[int]] = {}
        for number, stage in stages.items():
            asker = f"{stage.name} ({stage.place})"
            self.at.setdefault(tower.block(stage.place.at, asker), []).append(number)
            self._check(stage, asker)
        self.first = min(self.at, default=tower.depth)

    def _check(self, stage: Stage, asker: str) -> None:
        kind = type(self.tower.module).__name__
        if not stage.scheduler.static:
            raise UnsupportedModelError(
                f"{asker}: a {stage.scheduler.title} counts by scores, and rows of one batch must stay equally long "
                "inside the tower; use a scheduler of fixed counts there"
            )
        if stage.rectifier is not None and not all(takes(each, "attention_mask") for each in self.tower.attentions):
            raise UnsupportedModelError(
                f"{asker}: attention in {kind} takes no mask, so no bias; leave the rectifier out"
            )
        if stage.reads.tower:
            raise UnsupportedModelError(
                f"{asker}: a part reads {', '.join(sorted(stage.reads.tower))} of the tower inside the tower, "
                "which is not supported yet"
            )

    def mount(self) -> list[Handle]:
        """Add the hooks; returns their handles."""
        handles: list[Handle] = []
        for index in range(self.first, self.tower.depth):
            block, attention = self.tower.blocks[index], self.tower.attentions[index]
            handles.append(pre_hook(block, self._before(index)))
            # In front of transformers' own hooks, which record hidden states.
            handles.append(post_hook(block, self._behind, prepend=True))
            handles.append(pre_hook(attention, self._biased))
        return handles

    # ---------------------------------------------------------------- hooks

    def _before(self, index: int) -> Callable[..., Any]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            called = self.running()
            if called is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == self.first:
                called.reduction = begin(self.tower, hidden, called, self.reorder)
            run = called.reduction
            if run is None:
                return None
            run.full = hidden
            for number in self.at.get(index, ()):
                self._act(run, number)
            rows = run.rows
            if rows is None:
                return None
            taken = _take(run.full, rows)
            kwargs = {name: self._adjusted(rows, name, value) for name, value in kwargs.items()}
            if not args:
                return args, {**kwargs, "hidden_states": taken}
            by_place = zip(names(block)[1:], args[1:], strict=False)
            return (taken, *(self._adjusted(rows, name, value) for name, value in by_place)), kwargs

        return before

    def _adjusted(self, rows: Tensor, name: str, value: Any) -> Any:
        """An argument of a block, as it is for these rows."""
        if name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k") and isinstance(value, Tensor):
            return torch.unique_consecutive(torch.searchsorted(rows, value.to(rows.dtype)).to(value.dtype))
        if name == "position_embeddings" and value is not None:
            return tuple(each[rows] if rows.dim() == 1 else _take(each, rows) for each in value)
        if name == "position_ids" and isinstance(value, Tensor):
            return value[rows] if rows.dim() == 1 else _take(value, rows)
        if name == "attention_mask" and isinstance(value, Tensor):
            return _take_pairs(value, rows)
        return value

    def _reduction(self) -> Reduction | None:
        called = self.running()
        return None if called is None else called.reduction

    def _behind(self, block: nn.Module, args: Any, output: Any) -> Any:
        run = self._reduction()
        if run is None or run.rows is None or run.full is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if run.filled is not None:
            hidden = torch.where(run.filled[..., None], _take(run.full, run.rows), hidden)
        full = run.restored(_put(run.full, run.rows, hidden))
        run.full = None
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _biased(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._reduction()
        if run is None or run.rows is None or (run.tokens.bias is None and run.filled is None):
            return None
        implementation = str(getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa"))
        if implementation not in ("sdpa", "eager"):
            what = "a rectifier" if run.tokens.bias is not None else "pictures of several sizes"
            raise UnsupportedModelError(f"{what} inside the tower needs sdpa or eager attention, not {implementation}")
        hidden = args[0] if args else kwargs["hidden_states"]
        call = bound(attention, args, kwargs)
        call["attention_mask"] = _with_bias(call.get("attention_mask"), run, hidden.dtype)
        return (), call

    # ---------------------------------------------------------------- stages

    def _act(self, run: Reduction, number: int) -> None:
        stage, before, tower = self.stages[number], run.tokens, self.tower
        assert run.full is not None
        patches = run.patches(run.full)
        states = patches[run.units[before.slot]]  # [B, N, side², D]
        before = replace(before, hidden=states.float().mean(2).to(states.dtype))
        counts = tuple(cast("int", self.plan(grid)[number]) for (grid,) in before.grids)  # all are static
        result = stage(before, counts)
        after, plan = result.tokens, result.plan
        if result.written is not None and plan is not None:
            if tower.side == 1:
                new = after.hidden[:, :, None]
            else:
                new = states.gather(
                    1, _places(before, after).clamp(min=0)[..., None, None].expand(-1, -1, *states.shape[2:])
                )
                rank, there = result.written.clamp(min=0), result.written >= 0
                merged = merge(states, plan).to(new.dtype)
                batch = torch.arange(len(rank), device=rank.device)[:, None].expand_as(rank)
                new = new.clone()
                new[batch[there], rank[there]] = merged[there]
            patches[run.units[after.slot[after.valid]]] = new[after.valid]
            run.full = run.whole(patches, run.full)
        run.levels.append(Level(before.slot, before.valid, _places(before, after), plan))
        run.tokens = after
        there = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        there[run.units[after.slot[after.valid]]] = True
        mass = torch.ones(len(patches), device=patches.device)
        mass[run.units[after.slot[after.valid]]] = after.mass[after.valid][:, None].expand(-1, tower.side**2)
        run.gone[number] = torch.stack([1.0 - there.float(), mass], dim=1)
        run.rows = self._rows(run, stage, there)
        run.report.append(
            StageReport(
                name=stage.name,
                place=str(stage.place),
                layer=None,
                left=after.origin,
                merged=result.merged,
                sizes=after.sizes,
                scores=result.scores,
                scored=before.origin,
                watch=None,
            )
        )

    def _rows(self, run: Reduction, stage: Stage, there: Tensor) -> Tensor:
        assert run.full is not None
        if run.packed:
            return there.nonzero().flatten()
        pictures, prefix, counts = run.full.shape[0], self.tower.prefix, run.tokens.sizes
        if len(set(counts)) > 1:
            if not all(takes(each, "attention_mask") for each in self.tower.attentions):
                raise InputError(f"{stage.name} ({stage.place}): pictures of one batch must keep equally many tokens")
            most, area = max(counts) * self.tower.side**2, self.tower.side**2
            columns = (~there.view(pictures, -1)).int().argsort(dim=1, stable=True)[:, :most] + prefix
            own = torch.tensor(counts, device=columns.device)[:, None] * area
            filled = torch.arange(most, device=columns.device) >= own
            run.filled = torch.nn.functional.pad(filled, (prefix, 0))
        else:
            run.filled = None
            columns = there.view(pictures, -1).nonzero()[:, 1].view(pictures, -1) + prefix
        front = torch.arange(prefix, device=columns.device).expand(pictures, -1)
        return torch.cat([front, columns], dim=1)


def _places(before: Tokens, after: Tokens) -> Tensor:
    """``[B, K]`` which of `before` each of `after` is, -1 on padding."""
    origin = before.origin.masked_fill(~before.valid, torch.iinfo(torch.int64).max)
    return torch.searchsorted(origin, after.origin.clamp(min=0)).masked_fill(~after.valid, -1)


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 1:
        return hidden[..., rows, :]
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


def _with_bias(mask: Any, run: Reduction, dtype: torch.dtype) -> Tensor:
    """`mask`, if there is one, as numbers of `dtype`, with biases of keys and without rows that fill up."""
    lowest, bias = torch.finfo(dtype).min, run.biases()
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    added = None if bias is None else bias[:, None, None].to(dtype)
    if isinstance(mask, Tensor):
        added = mask if added is None else mask + added
    if run.filled is None:
        assert added is not None
        return added
    hidden = run.filled[:, None, None]
    return (
        torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, lowest)
        if added is None
        else added.masked_fill(hidden, lowest)
    )


def _take_pairs(mask: Tensor, rows: Tensor) -> Tensor:
    """The mask ``[R, 1, n, n]`` of whom each of these rows sees among them."""
    if rows.dim() == 1:
        return mask[..., rows, :][..., rows]
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    down = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.gather(2, down).gather(3, rows[:, None, None].expand(-1, mask.shape[1], rows.shape[1], -1))


def _put(full: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    full = full.clone()
    if rows.dim() == 1:
        full[..., rows, :] = hidden
        return full
    return full.scatter(1, rows[..., None].expand(-1, -1, hidden.shape[-1]), hidden)


def stages_inside(pipeline: Sequence[Stage]) -> dict[int, Stage]:
    """The stages of a pipeline that act inside the tower, by their number."""
    return {number: stage for number, stage in enumerate(pipeline) if stage.place.kind == "in_vision"}
