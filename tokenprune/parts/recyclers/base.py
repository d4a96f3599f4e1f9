"""The base class of recyclers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from tokenprune.core.merge import Merge, merge, reduce
from tokenprune.core.tokens import Count, Tokens
from tokenprune.parts.part import Part


class Recycler(Part):
    """Plans what becomes of the tokens that were not kept: nothing, or a merge. Base class of the role ``recycler``.

    A stage asks it last, behind the sampler. It moves nothing itself: the stage applies its plan, to hidden states and
    masses alike, and the engine writes every row that the plan has changed, anchors and survivors.
    """

    role = "recycler"
    suffix = "Recycler"

    @abstractmethod
    def added(self, dropped: int) -> int:
        """Anchors that it makes of `dropped` tokens: known without data, at most `dropped`, 0 for 0."""

    @abstractmethod
    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Merge | None:
        """The plan: which dropped tokens flow into which survivors or anchors; None drops them.

        Args:
            tokens: N vision tokens before the stage.
            kept: ``[B, K]`` indices into N, -1 where padded.
            scores: ``[B, N]`` float32.
            count: tokens kept of each sample (of each row of `kept`), as plain numbers.

        Its anchors, the dropped tokens whose slot, position and origin a merged token takes over, are as many as
        `added` has said. Survivors that are no target stay bit-identical.
        """

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        """New hidden states ``[B, M, D]`` of the plan's targets: its weighted sums, unless a part computes others."""
        return merge(tokens.hidden, plan)

    def recycle(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Count) -> Tokens:
        """What is left when the plan has been applied: for use without a stage. Arguments as in `forward`."""
        counts = tokens.counts(count)
        plan = self(tokens, kept, scores, counts)
        if plan is None:
            return tokens.take(kept, counts)
        return reduce(tokens, kept, counts, plan, self.states(tokens, plan))[0]
