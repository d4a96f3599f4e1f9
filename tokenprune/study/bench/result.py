"""`Bench`: what was measured, and what the ledger promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from tokenprune.cost.account import Cost, Ledger
from tokenprune.study.bench.clock import Sample
from tokenprune.study.statistics import Estimate, median_ratio

FEWEST = 5
"""Rounds below which an interval says nothing: the range of three holds the true median in three of four cases only."""
PHASES = ("prefill", "language", "decode", "total")


@dataclass(frozen=True)
class SideRow:
    """One side at one batch size."""

    name: str
    batch: int
    tokens: float
    """Vision tokens in a layer, mean over layers and samples."""
    samples: tuple[Sample, ...]
    untouched: tuple[Sample, ...]
    """Of the same rounds."""
    ledger: Ledger
    smaller: Ledger | None = None
    """For a smaller image: the ledger of that image, whose untouched side is what ran."""

    def seconds(self, phase: str) -> float:
        """Median over rounds: one of `PHASES`, or ``vision``."""
        return median(getattr(sample, phase) for sample in self.samples)

    @property
    def method(self) -> float | None:
        """Seconds of the stages, median over rounds; None where nobody could tell."""
        known = [sample.method for sample in self.samples if sample.method is not None]
        return median(known) if known else None

    def speedup(self, phase: str = "prefill") -> Estimate | None:
        """Untouched time over this side's, paired by round; None for a phase that did not run.

        Under `FEWEST` rounds there is no interval.
        """
        before, after = ([getattr(one, phase) for one in side] for side in (self.untouched, self.samples))
        return paired_speedup(before, after) if min(before) > 0 and min(after) > 0 else None

    @property
    def method_share(self) -> float | None:
        """Time of the stages as a share of the untouched prefill, paired by round; None where nobody could tell."""
        pairs = zip(self.samples, self.untouched, strict=True)
        shares = [own.method / before.prefill for own, before in pairs if own.method is not None]
        return median(shares) if shares else None

    @property
    def peak(self) -> int | None:
        """Most bytes on the device; None where nobody counts."""
        known = [sample.peak for sample in self.samples if sample.peak is not None]
        return max(known) if known else None

    @property
    def reduced(self) -> Cost:
        """What ran on this side, in multiply-adds."""
        return self.ledger.reduced if self.smaller is None else self.smaller.untouched

    def ceiling(self, phase: str = "prefill") -> float:
        """The speed-up if time went with multiply-adds (Amdahl): untouched over reduced, the method's own included.

        Args:
            phase: ``prefill``, ``language`` (without vision tower and projector) or ``total``.
        """
        return _cost(self.ledger.untouched, phase) / _cost(self.reduced, phase)

    def reached(self, phase: str = "prefill") -> float:
        """Speed-up as a share of its ceiling; `phase` as in `ceiling`."""
        found = self.speedup(phase)
        assert found is not None
        return found.value / self.ceiling(phase)

    @property
    def kv_share(self) -> float:
        """Cache behind the prefill, as a share of the untouched one's."""
        return self.reduced.kv_bytes / self.ledger.untouched.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        speed = {phase: None if (found := self.speedup(phase)) is None else found.to_dict() for phase in PHASES}
        return {
            "name": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "seconds": {**{phase: self.seconds(phase) for phase in (*PHASES, "vision")}, "method": self.method},
            "speedup": speed,
            "ceiling": {phase: self.ceiling(phase) for phase in ("prefill", "language", "total")},
            "reached": {phase: self.reached(phase) for phase in ("prefill", "language")},
            "exact": self.ledger.exact,
            "method_share": self.method_share,
            "kv_share": self.kv_share,
            "peak_bytes": self.peak,
            "samples": [asdict(sample) for sample in self.samples],
        }


@dataclass(frozen=True)
class Bench:
    """A recipe on a model on a machine."""

    model: str
    recipe: str
    budget: str | None
    fingerprint: str
    parameters: int
    tokens: int
    """Vision tokens of a sample."""
    text: int
    new_tokens: int
    attention: str
    compiled: bool
    dtype: str
    device: str
    rows: Sequence[SideRow]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        head = {key: value for key, value in vars(self).items() if key != "rows"}
        return {**head, "rows": [row.to_dict() for row in self.rows]}


def paired_speedup(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """`median_ratio` of an odd number of rounds; without an interval where they are fewer than `FEWEST`."""
    found = median_ratio(before, after)
    return found if len(before) >= FEWEST else replace(found, low=None, high=None)


def _cost(cost: Cost, phase: str) -> int:
    if phase == "language":
        return cost.prompt + cost.lm_head
    return cost.prefill if phase == "prefill" else cost.end_to_end
