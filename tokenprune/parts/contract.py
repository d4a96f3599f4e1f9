"""What each part promises the stage, held against what it returned: one message that names the part.

Shapes, types and counts are looked at for every part; that takes no kernel and waits for nothing. Values are looked at
by an assertion on the device, for parts of others alone: ours are held to the same promises by the tests of every part,
and a stage is many small kernels already.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tokenprune.core import ops, transfer
from tokenprune.core.groups import Groups
from tokenprune.core.merge import Merge
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.part import Part


class Contract:
    """The checks of one stage's parts.

    Args:
        stage: how messages call the stage.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def raters(self, part: Part, weights: Tensor, tokens: Tokens) -> None:
        """Rater weights ``[B, T]`` float32."""
        self._shape(part, "weights", weights, tuple(tokens.question.valid.shape))
        if not shipped(part):
            good = (weights >= 0).all() & torch.isfinite(weights).all()
            self._hold(good, part, "gave weights that are negative or not finite")

    def scores(self, part: Part, scores: Tensor, tokens: Tokens) -> None:
        """Scores ``[B, N]``: float32 and no NaN, which sorts above everything and would be kept in silence."""
        self._shape(part, "scores", scores, tuple(tokens.valid.shape))
        self._hold((scores == scores).all(), part, "gave NaN scores")  # NaN alone differs from itself

    def fixed_counts(self, part: Part, counts: object, tokens: Tokens) -> tuple[int, ...]:
        """Counts of a static scheduler: plain numbers, one for each sample, 0 … its tokens."""
        if not isinstance(counts, Sequence) or any(isinstance(k, bool) or not isinstance(k, int) for k in counts):
            raise self._broken(part, f"keeps {counts!r} tokens", "an int a sample")
        return self._counts(part, counts, tokens)

    def counts(self, part: Part, counts: Tensor, tokens: Tokens) -> tuple[int, ...]:
        """Counts of an adaptive scheduler, one for each sample, 0 … its tokens; read on the host."""
        self._shape(part, "counts", counts, (len(tokens.sizes),), torch.int64)
        return self._counts(part, counts.tolist(), tokens)

    def _counts(self, part: Part, counts: Sequence[int], tokens: Tokens) -> tuple[int, ...]:
        if len(counts) != len(tokens.sizes) or any(not 0 <= k <= n for k, n in zip(counts, tokens.sizes, strict=False)):
            raise self._broken(part, f"keeps {list(counts)} tokens", f"one count a sample, 0 … {list(tokens.sizes)}")
        return tuple(counts)

    def kept(self, part: Part, kept: Tensor, counts: Sequence[int], tokens: Tokens) -> None:
        """Indices ``[B, K]`` int64, as many as asked for: ascending, within 0 … N - 1, -1 behind the count of a row."""
        most = max(counts, default=0)
        self._shape(part, "indices", kept, (len(counts), most), torch.int64)
        if shipped(part) or not most:
            return
        real = ops.first(counts, most, kept.device)
        sizes = transfer.ints(tokens.sizes, kept.device).unsqueeze(1)
        ascending = (kept[:, 1:] > kept[:, :-1]) | ~real[:, 1:]
        good = (((kept >= 0) & (kept < sizes)) == real).all() & ascending.all()
        self._hold(good, part, f"gave indices out of range, out of order or twice, or not {list(counts)} of them")

    def groups(self, part: Part, groups: Groups, tokens: Tokens) -> None:
        """A group for every token, and a grid for every group."""
        if not isinstance(groups, Groups):
            raise self._broken(part, f"gave {type(groups).__name__}", "Groups")
        got = [sum(own) for own in groups.sizes]
        if got != list(tokens.sizes) or [len(own) for own in groups.sizes] != [len(own) for own in groups.grids]:
            raise self._broken(part, f"gave groups of {got} tokens in all", f"{list(tokens.sizes)}, and a grid a group")
        for sizes, grids in zip(groups.sizes, groups.grids, strict=True):
            for size, grid in zip(sizes, grids, strict=True):
                if prod(grid) != size:
                    raise self._broken(part, f"gave a group of {size} tokens the grid {tuple(grid)}", "one they fill")
        self._shape(part, "an index", groups.index, tuple(tokens.valid.shape), torch.int64)
        if not shipped(part):
            self._hold(_counted(groups, tokens), part, "gave an index that does not fit its sizes")

    def shares(
        self, part: Part, shares: Sequence[Sequence[int]], counts: Sequence[int], sizes: Sequence[Sequence[int]]
    ) -> None:
        """Counts by group, none above its group, that sum up to those of the samples."""
        pairs = [(k, n) for own, of in zip(shares, sizes, strict=False) for k, n in zip(own, of, strict=False)]
        same = [len(own) for own in shares] == [len(own) for own in sizes]
        if not same or any(not 0 <= k <= n for k, n in pairs) or [sum(own) for own in shares] != list(counts):
            expected = f"counts of {[list(own) for own in sizes]} that sum up to {list(counts)}"
            raise self._broken(part, f"shares out {[list(own) for own in shares]}", expected)

    def plan(self, part: Part, plan: Merge | None, added: Sequence[int], kept: Tensor, tokens: Tokens) -> None:
        """A plan whose anchors are as many as the recycler promised."""
        if plan is not None and not isinstance(plan, Merge):
            raise self._broken(part, f"gave {type(plan).__name__}", "a Merge, or None")
        anchors = [0] * len(added) if plan is None else list(plan.anchors)
        if anchors != list(added):
            raise self._broken(part, f"made {anchors} merged tokens", f"{list(added)}, as its `added` has promised")
        if plan is None:
            return
        batch, sources, targets = len(added), plan.source.shape[-1], plan.target.shape[-1]
        self._shape(part, "sources", plan.source, (batch, sources), torch.int64)
        self._shape(part, "targets", plan.target, (batch, targets), torch.int64)
        self._shape(part, "merge weights", plan.weight, (batch, targets, sources))
        if plan.share is not None:
            self._shape(part, "merge shares", plan.share, (batch, targets, sources))
        if not shipped(part):
            self._plan_values(part, plan, kept, tokens)

    def _plan_values(self, part: Part, plan: Merge, kept: Tensor, tokens: Tokens) -> None:
        """Sources are tokens of the sample; targets are dropped tokens, then survivors; weights are amounts."""
        n = tokens.valid.shape[1]
        sizes = transfer.ints(tokens.sizes, plan.source.device).unsqueeze(1)
        flows, real = (plan.source >= 0) & (plan.source < sizes), plan.target >= 0
        good = ((plan.source >= -1) & (plan.source < n)).all() & ((plan.target >= -1) & (plan.target < sizes)).all()
        self._hold(good, part, f"named tokens beyond the {n} of the stage")
        amounts = [plan.weight] if plan.share is None else [plan.weight, plan.share]
        for amount in amounts:
            of_real = flows.unsqueeze(1) | (amount == 0)
            good = ((amount >= 0) & torch.isfinite(amount) & of_real).all()
            self._hold(good, part, "gave merge weights that are negative, not finite, or not 0 on padding")
        if plan.hard:
            self._hold(((plan.weight == 0) | (plan.weight == 1)).all(), part, "called weights hard that are not 0 or 1")
        self._hold(((plan.weight.sum(-1) > 0) == real).all(), part, "gave a target no weight, or padding one")
        # Anchors come first in each row; all others are survivors. Neither is named twice.
        most = plan.target.shape[1]
        first = ops.first(plan.anchors, most, plan.target.device)
        survives = ops.mask_of(kept, n, padded=True).gather(1, plan.target.clamp(min=0))
        right = torch.where(first, ~survives & real, survives | ~real).all()
        rises = (plan.target[:, 1:] > plan.target[:, :-1]) | ~real[:, 1:] | (first[:, :-1] & ~first[:, 1:])
        self._hold(
            right & rises.all(), part, "gave targets that are not dropped tokens, then survivors, both ascending"
        )

    def states(self, part: Part, states: Tensor, plan: Merge, tokens: Tokens) -> None:
        """Hidden states ``[B, M, D]`` of a plan's targets."""
        shape = (*plan.target.shape, tokens.hidden.shape[2])
        if not isinstance(states, Tensor):
            raise self._broken(part, f"gave {type(states).__name__} for states", f"a tensor {shape}")
        if tuple(states.shape) != shape or not states.is_floating_point():
            raise self._broken(part, f"gave states {tuple(states.shape)} of {states.dtype}", f"{shape}, floating point")

    def bias(self, part: Part, bias: Tensor, tokens: Tokens) -> None:
        """Key biases ``[B, N]`` float32, finite."""
        self._shape(part, "biases", bias, tuple(tokens.valid.shape))
        if not shipped(part):
            self._hold(torch.isfinite(bias).all(), part, "gave biases that are not finite")

    def writes(self, tokens: Tokens) -> dict[str, int]:
        """How often each tensor that a part might write to in place has been written to, as PyTorch counts."""
        watched = {name: getattr(tokens, name) for name in ("hidden", "mass", "origin", "valid")}
        return {name: x._version for name, x in watched.items() if not x.is_inference()}

    def unchanged(self, parts: Sequence[Part], tokens: Tokens, before: dict[str, int]) -> None:
        """Nothing of `tokens` was written in place by `parts` since `writes` was asked."""
        for name, version in self.writes(tokens).items():
            if version != before[name]:
                titles = ", ".join(part.title for part in parts)
                raise InputError(f"{self.stage}: `tokens.{name}` was changed in place by one of: {titles}")

    def explain(self, error: RuntimeError) -> None:
        """Raise `InputError` if `error` is what PyTorch makes of an assertion of this stage."""
        text = str(error)
        if f"{self.stage}: " in text:
            told = text[text.index(f"{self.stage}: ") :].splitlines()[0]
            hint = "; are there NaN values in the model's activations?" if "NaN" in told else ""
            raise InputError(f"{told}{hint}") from None

    def _shape(
        self, part: Part, what: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> None:
        if not isinstance(x, Tensor):
            raise self._broken(part, f"gave {type(x).__name__} for {what}", f"a tensor {shape}")
        if tuple(x.shape) != shape or x.dtype != dtype:
            expected = f"{shape} of {str(dtype).removeprefix('torch.')}"
            raise self._broken(part, f"gave {what} {tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}", expected)

    def _broken(self, part: Part, got: str, expected: str) -> InputError:
        return InputError(f"{self.stage}: {part.title} {got}; expected {expected}")

    def _hold(self, good: Tensor, part: Part, broken: str) -> None:
        """Assert on the device: an accelerator raises later, and is not waited for."""
        told = f"{self.stage}: {part.title} {broken}"
        if torch.compiler.is_compiling() or good.device.type != "cpu":
            torch._assert_async(good, told)
            return
        try:
            torch._assert_async(good, told)
        except RuntimeError as error:
            self.explain(error)
            raise


def shipped(part: Part) -> bool:
    """Whether the part is one of ours, as it stands."""
    return type(part).__module__.startswith("tokenprune.parts.")


def _counted(groups: Groups, tokens: Tokens) -> Tensor:
    """Whether each group's tokens by `Groups.index` are as many as its size says."""
    most = max((len(own) for own in groups.sizes), default=0)
    said = [(*own, *[0] * (most - len(own))) for own in groups.sizes]
    number = torch.arange(most, device=groups.index.device)
    found = ((groups.index.unsqueeze(-1) == number) & tokens.valid.unsqueeze(-1)).sum(1)
    return (found == torch.tensor(said, device=found.device).reshape(len(said), most)).all()
