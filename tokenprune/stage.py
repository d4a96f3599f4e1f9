"""One stage: raters judge, a scorer scores, a scheduler counts, a sampler picks, a recycler deals with the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenprune.core import ops
from tokenprune.core.place import Place
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError
from tokenprune.parts.raters.base import RaterSelector
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.schedulers.base import Scheduler
from tokenprune.parts.scorers.base import Scorer

Positions = Literal["original", "renumber"]


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage made of its tokens."""

    tokens: Tokens
    """Survivors and merged tokens, in raster order."""
    kept: Tensor
    """``[B, K]`` original indices of the tokens kept as they are, ascending, -1 where padded."""
    merged: Tensor
    """``[B, M]`` original indices of the anchors of merged tokens, -1 where padded."""
    scores: Tensor | None
    """``[B, N]`` float32 scores of the tokens that came in; None when all were kept and nothing was scored."""
    weights: Tensor | None = None
    """``[B, T]`` rater weights; None without raters, and where nothing was scored."""


class Stage(nn.Module):
    """A place, and the parts that act there.

    Args:
        place: where.
        scheduler: how many tokens survive.
        scorer: what each is worth.
        sampler: which ones survive.
        recycler: what becomes of the rest.
        raters: whose attention counts, for scorers that need raters.
        positions: survivors keep their ``original`` position ids, or ``renumber`` (fidelity to older code).
        name: how error messages and reports call it.
    """

    def __init__(
        self,
        *,
        place: Place,
        scheduler: Scheduler,
        scorer: Scorer,
        sampler: Sampler,
        recycler: Recycler,
        raters: RaterSelector | None = None,
        positions: Positions = "original",
        name: str = "stage",
    ) -> None:
        super().__init__()
        self.place = place
        self.positions = positions
        self.name = name
        self.raters = raters
        self.scorer = scorer
        self.scheduler = scheduler
        self.sampler = sampler
        self.recycler = recycler
        self.shared_raters = None if raters is None or not raters.per_prompt else repr(raters)
        """Equal for stages whose rater weights are the same throughout a prompt; None where they are not."""
        self._nan = f"{name} ({place}): scorer {type(scorer).name()!r} gave NaN scores"  # one graph cannot format it

    @property
    def reads_attention(self) -> frozenset[str]:
        """Whose attention its parts read: of the ``"previous"`` layer, of the ``"next"`` one, of both or none."""
        return frozenset(which for which in (self.scorer.needs_attention, self.scheduler.needs_attention) if which)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, place={str(self.place)!r}, positions={self.positions!r}"

    def forward(self, tokens: Tokens, count: Count | None = None, weights: Tensor | None = None) -> StageResult:
        """Reduce `tokens`.

        Args:
            tokens: N vision tokens.
            count: tokens to keep, when a budget for the whole recipe has fixed it; else the scheduler decides.
            weights: what `raters` would say, ``[B, T]``, where an earlier stage has asked the same ones.

        Raises:
            InputError: a count beyond the tokens at hand, or scores that are not numbers.
        """
        if count is None and self.scheduler.static:
            count = self.scheduler(tokens, tokens.hidden)
        if count is not None and tokens.counts(count) == tokens.sizes:
            return self._untouched(tokens)
        if weights is None and self.raters is not None:
            weights = self.raters(tokens)
        scores = self.scorer(tokens, weights)
        self._refuse_nan(scores)
        if count is None:
            count = tuple(self.scheduler(tokens, scores, weights).tolist())
            if count == tokens.sizes:
                return self._untouched(tokens, weights)
        counts = tokens.counts(count)
        kept = self.sampler(tokens, scores, counts)
        reduced, merged = self.recycler(tokens, kept, scores, counts)
        clusters = [size - k for size, k in zip(reduced.sizes, counts, strict=True)]
        return StageResult(reduced, _origins(tokens, kept, counts), _origins(tokens, merged, clusters), scores, weights)

    def _untouched(self, tokens: Tokens, weights: Tensor | None = None) -> StageResult:
        return StageResult(tokens, tokens.origin, tokens.origin[:, :0], None, weights)

    def _refuse_nan(self, scores: Tensor) -> None:
        """NaN sorts above everything, so one would be kept in silence. The check never waits for an accelerator."""
        numbers = (scores == scores).all()  # NaN alone differs from itself
        if torch.compiler.is_compiling() or scores.device.type != "cpu":
            torch._assert_async(numbers, self._nan)
            return
        try:
            torch._assert_async(numbers, self._nan)
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        """Raise `InputError` if `error` is what PyTorch makes of NaN scores at this stage."""
        if self._nan in str(error):
            raise InputError(f"{self._nan}; are there NaN values in the model's activations?") from None


def _origins(tokens: Tokens, index: Tensor, counts: Sequence[int]) -> Tensor:
    if not ops.ragged(counts):
        return tokens.origin.gather(1, index)
    return tokens.origin.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
