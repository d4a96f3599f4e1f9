"""`Bench`: what was measured, and what the ledger promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tokenprune.bench.clock import Sample
from tokenprune.bench.statistics import Ratio, ratio
from tokenprune.flops.ledger import Ledger

PHASES = ("prefill", "decode", "total")


@dataclass(frozen=True)
class Row:
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
        """Median over rounds: ``prefill``, ``decode``, ``total`` or ``method``."""
        return median(getattr(sample, phase) for sample in self.samples)

    def speedup(self, phase: str = "prefill") -> Ratio | None:
        """Untouched time over this side's, paired by round; None for a phase that did not run."""
        before, after = ([getattr(one, phase) for one in side] for side in (self.untouched, self.samples))
        return ratio(before, after) if min(before) > 0 and min(after) > 0 else None

    @property
    def method_share(self) -> float:
        """Time of the stages as a share of the untouched prefill, paired by round."""
        return median(a.method / b.prefill for a, b in zip(self.samples, self.untouched, strict=True))

    @property
    def peak(self) -> int | None:
        """Most bytes on the device; None where nobody counts."""
        known = [sample.peak for sample in self.samples if sample.peak is not None]
        return max(known) if known else None

    def ceiling(self, view: str = "prefill") -> float:
        """The speed-up if time went with multiply-adds (Amdahl): untouched over reduced, the method's own included."""
        reduced = self.ledger.reduced if self.smaller is None else self.smaller.untouched
        return float(getattr(self.ledger.untouched, view) / getattr(reduced, view))

    @property
    def reached(self) -> float:
        """Speed-up of the prefill as a share of its ceiling."""
        found = self.speedup("prefill")
        assert found is not None
        return found.value / self.ceiling()

    @property
    def kv_share(self) -> float:
        """Cache behind the prefill, as a share of the untouched one's."""
        reduced = self.ledger.reduced if self.smaller is None else self.smaller.untouched
        return reduced.kv_bytes / self.ledger.untouched.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        speed = {phase: None if (found := self.speedup(phase)) is None else found.to_dict() for phase in PHASES}
        return {
            "name": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "seconds": {phase: self.seconds(phase) for phase in (*PHASES, "method")},
            "speedup": speed,
            "ceiling": {"prefill": self.ceiling(), "total": self.ceiling("end_to_end")},
            "reached": self.reached,
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
    rows: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        head = {key: value for key, value in vars(self).items() if key != "rows"}
        return {**head, "rows": [row.to_dict() for row in self.rows]}
