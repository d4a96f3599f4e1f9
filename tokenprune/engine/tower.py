"""What a vision tower computes, read as it runs, for the parts that judge by it: attention, keys, hidden states.

Hooks stand on the blocks that a recipe reads, and on no others. What they record waits until the prompt that holds
these pictures reaches the language model, and becomes rows of vision tokens there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.needs import parse_tower_signal
from tokenprune.core.signals import Signal
from tokenprune.engine.prompt import Prompt
from tokenprune.engine.state import Threads
from tokenprune.engine.tower_attention import BlockCall, class_attention, mount, received_attention
from tokenprune.engine.traces import Handle, post_hook, pre_hook
from tokenprune.engine.vision_run import Run, run_of
from tokenprune.engine.vision_stages import VisionStages, stages_inside
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.adapter import VisionCall
from tokenprune.families.anatomy import Anatomy
from tokenprune.families.tower import Tower
from tokenprune.pipeline import Pipeline


class TowerTaps:
    """Signals of the vision tower that a pipeline reads, from hooks on its blocks; nothing where none is read.

    Args:
        anatomy: the model's modules.
        pipeline: its stages say what they read, and act inside the tower.
        threads: whose prompts the pictures belong to.

    Raises:
        UnsupportedModelError: the model has no such block, or none that can be read.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline, threads: Threads) -> None:
        self.anatomy = anatomy
        self.pipeline = pipeline
        self.threads = threads
        self.notes: list[str] = []
        """What stands in for what, in words."""
        self.projector: Callable[[Tensor], Tensor] | None = None
        """What makes vision tokens of the tower's hidden states, for parts that merge in front of it."""
        self._wanted: dict[int, dict[str, str]] = {}
        """Block to signals by the names under which they are read."""
        reads = {name: f"{stage.name} ({stage.place})" for stage in pipeline for name in stage.reads.tower}
        inside = stages_inside(pipeline.stages)
        self.stages: VisionStages | None = None
        """Those inside the tower."""
        if not reads and not inside:
            return
        self.tower: Tower = anatomy.adapter.tower_parts(anatomy.base)
        for name, reader in sorted(reads.items()):
            signal, at = parse_tower_signal(name)
            block = self.tower.block(at, f"{reader}: {name!r}")
            if signal == "class_attention" and not self.tower.class_token:
                signal = "received_attention"
                self.notes.append(
                    f"{name}: {type(self.tower.module).__name__} has no class token; "
                    f"received_attention of block {block} stands in"
                )
            self._wanted.setdefault(block, {})[name] = signal
        if readers := [f"{stage.name} ({stage.place})" for stage in pipeline if stage.reads.projector]:
            self.projector = anatomy.adapter.projector(anatomy.base, self.tower)
            if self.projector is None:
                self.notes.append(
                    f"{', '.join(readers)}: the projector of {anatomy.adapter.title} does not take tokens one by one; "
                    "what it gives is merged, not what it reads"
                )
        if inside:
            self.stages = VisionStages(self.tower, inside, self._running, self._reorder, pipeline.picture_plan)
            self._check(pipeline)

    def _check(self, pipeline: Pipeline) -> None:
        """Raise `UnsupportedModelError` for what does not go together with stages inside the tower."""
        assert self.stages is not None
        late = [name for block, wanted in self._wanted.items() if block >= self.stages.first for name in wanted]
        if late:
            raise UnsupportedModelError(
                f"{pipeline.name}: {', '.join(sorted(late))} of a block in which a stage has left fewer patches is not "
                f"supported yet; read a block before block {self.stages.first}"
            )

    def _running(self) -> Run | None:
        return self.threads.now.tower.running

    def _reorder(self, rows: Tensor, grid: Tensor | None) -> Tensor:
        return self.anatomy.adapter.in_grid_order(self.tower, rows, VisionCall(grid, None))

    @property
    def blocks_read(self) -> set[int]:
        """Blocks of the tower that are read."""
        return set(self._wanted)

    def mount(self) -> list[Handle]:
        """Add the hooks; returns their handles."""
        if not self._wanted and self.stages is None:
            return []
        handles: list[Handle] = [pre_hook(self.tower.module, self._begin)]
        for block, wanted in self._wanted.items():
            if any(signal != "hidden" for signal in wanted.values()):
                handles += mount(self.tower.attentions[block], self._attention_ran(wanted))
            if names := [name for name, signal in wanted.items() if signal == "hidden"]:
                handles.append(post_hook(self.tower.blocks[block], self._block_ran(names)))
        return handles if self.stages is None else handles + self.stages.mount()

    # ---------------------------------------------------------------- whose pictures

    @contextmanager
    def generating(self, batch: int | None, kwargs: dict[str, Any]) -> Iterator[None]:
        """A call of `generate`, which may run the tower by itself, before the base model is called.

        Args:
            batch: its samples, before beams and several answers make more rows of each.
            kwargs: its arguments.
        """
        pictured = self.threads.now.tower
        pictured.clear()
        pictured.batch, pictured.sizes = batch, kwargs.get("image_sizes")
        try:
            yield
        finally:
            pictured.batch = None
            pictured.clear()

    def repeat(self, pictures: int, owner: Tensor) -> None:
        """What was recorded of so many pictures, of equal size, becomes that of rows that share them, ``[Q]`` each."""
        (run,) = self.threads.now.tower.runs
        run.values = {name: partial(_rows_of, value, pictures, owner) for name, value in run.values.items()}

    def told(self, prompt: Prompt, names: Collection[str]) -> Prompt:
        """`prompt` with signals of these names, as rows of its vision tokens: it is about to be reduced.

        Raises:
            InputError: the tower has not run for these pictures.
            UnsupportedModelError: it has run for pictures and for a video.
        """
        run, tokens, found = self._run_of(", ".join(sorted(names))), prompt.tokens, {}
        for name in names:
            found[name] = Signal(self._by_sample(run, name, run.values[name](), prompt), tokens.valid_if_padded)
        return replace(prompt, tokens=replace(tokens, signals=tokens.signals.adding(found), projector=self.projector))

    def gone(self, prompt: Prompt) -> dict[int, Tensor]:
        """For each stage inside the tower by its number, ``[B, N, 2]``: 1 where it has left no token, and masses.

        Raises as `told` does, and `BudgetError` where a count had several pictures to share.
        """
        if self.stages is None:
            return {}
        told = ", ".join(f"{stage.name} ({stage.place})" for stage in self.stages.stages.values())
        run, batch = self._run_of(told), prompt.tokens.total[:: self._copies(prompt)]
        assert run.reduction is not None
        self.pipeline.check_pictures(len(run.reduction.tokens.sizes), sum(total > 0 for total in batch))
        return {number: self._by_sample(run, told, rows, prompt) for number, rows in run.reduction.gone.items()}

    def _run_of(self, told: str) -> Run:
        """The run that made the pictures of the present prompt."""
        pictured = self.threads.now.tower
        if not pictured.runs:
            raise InputError(
                f"{told}: the vision tower has not run for this prompt (were its features given as inputs_embeds, or "
                "are the questions packed?); give the model pixels, or use a recipe that reads no tower"
            )
        if len(pictured.runs) > 1:
            raise UnsupportedModelError(
                f"{told}: the vision tower ran {len(pictured.runs)} times for one prompt, and whose patches are whose "
                "is not told; ask about pictures and about video one by one"
            )
        pictured.consumed = True
        return pictured.runs[0]

    def _copies(self, prompt: Prompt) -> int:
        """Rows of each sample: more than one for beams and several answers."""
        rows = len(prompt.tokens.total)
        return max(1, rows // (self.threads.now.tower.batch or rows))

    def _by_sample(self, run: Run, told: str, patches: Tensor, prompt: Prompt) -> Tensor:
        """``[B, N, ...]`` rows of the vision tokens of each sample, from rows of patches."""
        tokens, base, pictured = prompt.tokens, self.anatomy.base, self.threads.now.tower
        copies = self._copies(prompt)
        flat = [grid for sample in prompt.grids[::copies] for grid in sample]
        call = VisionCall(run.grid, pictured.sizes)
        patches = patches.to(tokens.hidden.device)
        patches = patches if run.real is None else patches[run.real.to(patches.device)]
        each = self.anatomy.adapter.to_tokens(base, self.tower, patches, flat, call)
        total = list(tokens.total[::copies])
        if len(each) != sum(total):
            raise InputError(
                f"{told}: the vision tower saw pictures of {len(each)} vision tokens, but the prompt has {sum(total)}: "
                "whose are whose is not told"
            )
        return torch.nn.utils.rnn.pad_sequence(list(each.split(total)), batch_first=True).repeat_interleave(copies, 0)

    # ---------------------------------------------------------------- hooks

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.threads.now.tower.add(run_of(module, args, kwargs))

    def _attention_ran(self, wanted: dict[str, str]) -> Callable[[BlockCall], None]:
        def ran(call: BlockCall) -> None:
            run = self._running()
            if run is None:  # a block that is called by itself
                return
            pictures = run.pictures
            signals: dict[str, Callable[[], Tensor]] = {
                "keys": call.keys,
                "class_attention": lambda: class_attention(call),
                "received_attention": lambda: received_attention(call, pictures(), run.real),
            }
            for name, signal in wanted.items():
                if signal in signals:
                    run.values[name] = partial(self._patches, signals[signal])

        return ran

    def _block_ran(self, names: Sequence[str]) -> Callable[..., None]:
        def ran(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows, run = hidden if hidden.dim() == 3 else hidden[None], self._running()
            if run is not None:
                run.values.update(dict.fromkeys(names, lambda: self._patches(lambda: rows)))

        return ran

    def _patches(self, signal: Callable[[], Tensor]) -> Tensor:
        """A signal ``[R, n, ...]`` of the tower's rows as ``[patches, ...]``: without what stands in front of them."""
        return signal()[:, self.tower.prefix :].flatten(0, 1)


def _rows_of(signal: Callable[[], Tensor], pictures: int, owner: Tensor) -> Tensor:
    """Patches ``[Q · n, ...]`` of the picture of each row, from those of all pictures ``[pictures · n, ...]``."""
    rows = signal().unflatten(0, (pictures, -1))
    return rows[owner.to(rows.device)].flatten(0, 1)
