"""The recipes of `tokenprune.testing.kinds` for the tiny models of 8 layers."""

from __future__ import annotations

from typing import Any

from tokenprune.testing.kinds import ATTENTION as ATTENTION
from tokenprune.testing.kinds import fixed, kinds, recipe, stage

KINDS: dict[str, dict[str, Any]] = kinds(8)
"""Name to recipe."""

IDENTITY = recipe(
    "identity",
    stage("after_vision", fixed(1.0), sampler="uniform"),
    stage(1, fixed(1.0), raters="last_text", scorer=ATTENTION),
    stage(5, {"type": "pyramid", "keep": 1.0}, scorer="norm", recycler="cluster", positions="renumber"),
)
"""Stages everywhere that keep everything."""


def skipping(place: Any, count: Any = 6, **parts: Any) -> dict[str, Any]:
    """A recipe of one stage whose dropped tokens skip."""
    made = fixed(count) if isinstance(count, int | float) else count
    return recipe("skip", stage(place, made, **{"scorer": "random", "dropped": "skip_ffn", **parts}))
