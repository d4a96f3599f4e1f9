"""The ledger of stages inside a vision tower, against PyTorch's counter on the real modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
from families import FAMILIES, Row, build, inputs, sizes, vision_mask
from hidden_patches import inside, later

import tokenprune as tp
from tokenprune.core.grids import Tiles
from tokenprune.cost.account import account
from tokenprune.cost.shape import TiledClip
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.shape import model_shape
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.scorers.features import DensityPeaksScorer
from tokenprune.study.counters import torch_counts

TOWER = {"llava": "model.vision_tower", "llava_next": "model.vision_tower"}


def both(family: str, stages: list[Any]) -> tuple[dict[str, int], Any, Any]:
    """What PyTorch counts, what the ledger tells, and the report."""
    model = build(family)
    batch = inputs(family, model, rows=[Row(images=(sizes(family)[0],), after=9)])
    pipeline = tp.Pipeline(stages)
    with tp.attach(model, pipeline) as attached:
        counts = torch_counts(model, batch)
        report = attached.report
    total = int(vision_mask(model, batch["input_ids"]).sum())
    text = batch["input_ids"].shape[1] - total
    told = account(model_shape(model), pipeline, total=total, grids=report.grids[0], text=text, question=9)
    return counts, told, report


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_same(family: str) -> None:
    """To the last multiply-add: blocks on fewer patches, the stages' own work, and the layers behind."""
    stages = [inside(0, 0.75), inside(1, 0.4, scorer=DensityPeaksScorer()), later(3, 0.2)]
    counts, told, report = both(family, stages)
    tower = counts[TOWER.get(family, "model.visual")]
    own = sum(stage.total for stage in told.reduced.stages[:2])
    assert own > 0
    reduced = told.reduced.vision_tower + own + (0 if family in TOWER else told.reduced.projector)
    if family == "qwen2_5_vl":  # windows: which patches are left decides how many see each other
        assert not told.exact and str(told).count("≈") > 3
        assert abs(reduced - tower) < 0.05 * tower
    else:
        assert told.exact and reduced == tower
        assert counts[""] == told.reduced.prefill
    assert report.vision_tokens[0].tolist() == [row.vision for row in told.reduced.rows]
    assert told.reduced.vision_tower < told.untouched.vision_tower


def test_tiles_that_are_cut_are_about_right() -> None:
    """Unpadding takes whatever is left in the margin, which no count tells; row separators stay."""
    shape = TiledClip(layers=2, width=8, mlp=16, matrices=2, patch=48, projector=((8, 8),), side=4)
    cut, whole = ((1, 4, 4), Tiles(1, 4, 7)), ((1, 4, 4), Tiles(1, 4, 9))  # 6 of 8 columns, and all
    for grids, expected in ((cut, 8 + 4 + 12), (whole, 8 + 4 + 16)):
        assert shape.pictures(0, grids) == ((1, 4, 4),) * 3
        assert shape.arriving(0, grids, (8, 8, 8)) == (expected, grids is whole)
        assert shape.arriving(0, grids, (16, 16, 16)) == (sum(math.prod(grid) for grid in grids), True)


def test_what_is_not_counted_is_named() -> None:
    stage = inside(1, 0.4, recycler=ClusterRecycler(share=0.6, per_cluster=3))
    _, told, _ = both("llava", [stage])
    assert told.reduced.unstated == ("merged patches given back after each block of the tower",)
    shape = model_shape(build("llava"))
    ask: dict[str, Any] = {"total": 25, "grids": ((1, 5, 5),), "text": 9}
    with pytest.raises(UnsupportedModelError, match=r"block 3, but the vision tower has 3 blocks; expected 0 … 2"):
        account(shape, tp.Pipeline([inside(3)]), **ask)


def test_a_stage_that_keeps_all_saves_and_costs_nothing() -> None:
    _, told, _ = both("llava", [inside(1, 1.0, scorer=DensityPeaksScorer())])
    assert told.reduced.prefill == told.untouched.prefill and told.reduced.method == 0
