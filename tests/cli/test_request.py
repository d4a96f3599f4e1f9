"""`tokenprune fit` of a recipe that asks again, and `tokenprune run` with what it has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_request_is_fitted_and_asks(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit = ("fit", "visionthink", "--variant", "pooled", "--output", out, "--scenes", 2, "--steps", 2, "--batch", 2)
    facts = json.loads(cli(*fit, "--json").out)
    assert all(Path(path).is_file() for path in [facts["recipe"], facts["plot"], *facts["weights"]])
    assert f"next: tokenprune run --recipe {facts['recipe']}" in cli(*fit).out, "nothing else can ask twice"
    told = cli("run", "--recipe", facts["recipe"], "--json")
    (first, *_) = json.loads(told.out)["passes"]
    assert told.status == 0 and 0 < first["asks"] < 1
    shown = cli("run", "--recipe", facts["recipe"]).out
    assert "asks" in shown and f"{first['asks']:.1%}" in shown
    assert json.loads(cli("show", facts["recipe"], "--json").out)["weights"]["again"].startswith("visionthink")


def test_an_aim_of_another_recipe_is_told_and_leaves_nothing(cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    for recipe, aim, message in (
        ("visionthink", "logits", "what learns there is its request, with the aim reward, not logits"),
        ("text-conditioned", "reward", "does not ask again, so there is no request to reward"),
    ):
        told = cli("fit", recipe, "--aim", aim, "--output", out, "--scenes", 2)
        assert (told.status, message in told.err, out.exists()) == (2, True, False)
