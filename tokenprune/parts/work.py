"""`Work`: the sizes that a stage works on, from which each part says what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage on one sample. All sizes are plain numbers; costs are multiply-adds of matrix products."""

    tokens: int
    """Vision tokens that come in (N)."""
    kept: int
    """Of these, tokens kept as they are."""
    total: int
    """Original vision tokens of the sample."""
    text: int
    """Text tokens that may rate (T): those of the prompt behind its first image."""
    sequence: int
    """All tokens of the present sequence, text included (L)."""
    width: int
    """Numbers per hidden state."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key heads."""
    head_dim: int
    """Numbers per head."""

    @property
    def dropped(self) -> int:
        return self.tokens - self.kept

    def rater_rows(self, *, normalise: Literal["all", "vision"] = "all", gravity: bool = False) -> int:
        """What `tokenprune.attention` and the engine do for one reading of a layer's attention.

        Queries of all T text tokens and keys of all L tokens are projected afresh, beside the layer's own; then each
        text token is compared with all keys, or with those of the vision tokens.
        """
        projected = self.width * self.head_dim * (self.text * self.heads + self.sequence * self.kv_heads)
        columns = self.sequence if normalise == "all" else self.tokens
        compared = self.text * columns * self.heads * self.head_dim
        return projected + compared + gravity * self.text * self.tokens * self.head_dim
