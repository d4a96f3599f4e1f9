"""Small recipes, one of each kind that the engine must be exact for, as plain data for `load_recipe`."""

from __future__ import annotations

from typing import Any

ATTENTION = {"type": "attention"}


def recipe(name: str, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe of these stages."""
    return {"version": 1, "name": name, "stages": list(stages), **more}


def stage(place: Any, scheduler: Any, **more: Any) -> dict[str, Any]:
    """A stage ``"after_vision"``, or before the layer of this number."""
    where = place if place == "after_vision" else {"before_layer": place}
    return {"place": where, "scheduler": scheduler, **more}


def fixed(keep: float) -> dict[str, Any]:
    """A scheduler that keeps a share, or a count."""
    return {"type": "fixed", "keep": keep}


def kinds(depth: int) -> dict[str, dict[str, Any]]:
    """Name to recipe, with the places of a decoder of 8 layers moved to one of `depth`."""

    def at(layer: int) -> int:
        return min(depth - 1, max(1, layer * depth // 8))

    return {
        # Static counts, before layer 0.
        "after_vision": recipe("after_vision", stage("after_vision", fixed(0.5), sampler="uniform")),
        # Several static stages, scores from the layer before and from the layer at the place.
        "attention": recipe(
            "attention",
            stage(at(1), fixed(0.7), raters="last_text", scorer=ATTENTION),
            stage(at(3), fixed(0.5), raters="above_mean", scorer={"type": "attention", "layer": "next"}),
            stage(
                at(5), fixed(0.2), raters="all_text", scorer={"type": "attention", "rope": False, "normalise": "vision"}
            ),
        ),
        # Counts that depend on the scores, different in each row.
        "adaptive": recipe(
            "adaptive",
            stage(
                at(2),
                {"type": "lattice", "stride": 3, "keep": 0.3},
                raters="last_text",
                scorer={"type": "attention", "rope": False, "normalise": "vision"},
                sampler={"type": "union", "stride": 3},
            ),
            stage(
                at(4),
                {"type": "rank_ratio", "scale": 0.5, "energy": 0.9},
                raters="above_mean",
                scorer=ATTENTION,
                recycler={"type": "cluster", "share": 0.5, "per_cluster": 3},
            ),
        ),
        # Merged tokens in their anchors' slots, pruned again later.
        "merging": recipe(
            "merging",
            stage(at(1), fixed(0.5), scorer="norm", recycler={"type": "cluster", "share": 0.6, "per_cluster": 3}),
            stage(at(4), fixed(4), scorer="random", recycler={"type": "cluster", "share": 0.6, "per_cluster": 3}),
        ),
        # Two stages at one place, and a last stage that keeps one token.
        "deep": recipe(
            "deep",
            stage(at(2), fixed(0.8), scorer="random"),
            stage(at(2), fixed(0.5), scorer="raster"),
            stage(at(7), fixed(1), scorer="norm"),
        ),
    }


def kept(depth: int) -> dict[str, Any]:
    """Stages that keep everything, and ask nothing that a family may refuse."""
    return recipe(
        "kept",
        stage("after_vision", fixed(1.0), sampler="uniform"),
        stage(min(depth - 1, 5), {"type": "pyramid", "keep": 1.0}, scorer="norm", recycler="cluster"),
    )
