"""The rounding rule, and what a recipe may cost."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from tokenprune.errors import BudgetError, did_you_mean

BudgetKind = Literal["keep", "average", "final", "flops"]


def count_of(keep: float, of: int) -> int:
    """How many of `of` vision tokens `keep` stands for: the one rounding rule of the package.

    Args:
        keep: a share in (0, 1], rounded down but never below one token; or a count, at most all tokens are kept.
        of: vision tokens that the keep refers to, 0 or more.

    Raises:
        BudgetError: a keep that is neither a share nor a count.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise BudgetError(f"keep must be a share in (0, 1] or a count of at least 1, got {keep!r}")
    if of < 0:
        raise BudgetError(f"cannot keep a part of {of} vision tokens")
    if isinstance(keep, int):
        if keep < 1:
            raise BudgetError(f"keep as a count must be at least 1, got {keep}")
        return min(keep, of)
    if not 0.0 < keep <= 1.0:
        raise BudgetError(f"keep as a share must lie in (0, 1], got {keep} (write a count without a decimal point)")
    share = plain_fraction(keep)
    return min(of, max(1, share.numerator * of // share.denominator))


def part_of(share: float, of: int) -> int:
    """`share` of a large number such as a cost, rounded down."""
    plain = plain_fraction(share)
    return plain.numerator * of // plain.denominator


def plain_fraction(share: float) -> Fraction:
    """The nearest plain fraction undoes float error: 1 - 0.9 is 0.09999999999999998, yet a tenth of 10 tokens is 1."""
    return Fraction(share).limit_denominator(10**9)


@dataclass(frozen=True)
class Budget:
    """What a whole recipe may cost: in vision tokens per layer, or in multiply-adds.

    Raises:
        BudgetError: an unknown kind, a value that is neither a share nor a count, or a count of ``flops``.
    """

    kind: BudgetKind
    """``keep``: average over the layers from the recipe's first place on (with one place: exactly the survivors).
    ``average``: average over all layers, counted on layer inputs, which is what the layers really process.
    ``final``: tokens after the last stage.
    ``flops``: multiply-adds of the prefill, from the pixels to the first token, the recipe's own work included."""
    value: float
    """A share in (0, 1] of the sample's original vision tokens, or a count; with ``flops``, a share of the untouched
    prefill."""

    def __post_init__(self) -> None:
        kinds = get_args(BudgetKind)
        if self.kind not in kinds:
            raise BudgetError(
                f"budget: expected one of {', '.join(kinds)}, got {self.kind!r}{did_you_mean(self.kind, kinds)}"
            )
        try:
            count_of(self.value, 1)
        except BudgetError as error:
            raise BudgetError(f"budget {self}: {error}") from None
        if self.kind == "flops" and not self.is_share:
            raise BudgetError(
                f"budget {self}: expected a share of the untouched prefill in (0, 1] such as 0.35, got a count"
            )

    @property
    def is_share(self) -> bool:
        return isinstance(self.value, float)

    def __str__(self) -> str:
        return f"{self.kind}: {self.value!r}"
