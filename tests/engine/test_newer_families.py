"""What is peculiar to MiniCPM-V, Molmo 2, FastVLM and Perception-LM; the matrix runs all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Row, build, inputs, sizes

import tokenprune as tp
from tokenprune.core.grids import UnknownGrid
from tokenprune.errors import InputError, UnsupportedModelError

GRIDS: dict[str, tuple[tuple[tuple[int, int, int], ...], ...]] = {
    "minicpmv4_6": (((1, 4, 4),), ((1, 3, 5), (1, 4, 4))),
    "molmo2": (((1, 3, 3), (1, 3, 3)), ((1, 3, 3), (1, 6, 3), (1, 3, 3), (1, 3, 3))),
    "fast_vlm": (((1, 4, 4),), ((1, 4, 4), (1, 4, 4))),
    "perception_lm": (((1, 4, 4),), ((1, 4, 4), (1, 4, 4))),
}
"""Of the two rows of `ragged_rows`."""


@pytest.mark.parametrize("family", GRIDS)
@torch.no_grad()
def test_grids_of_each_sample(family: str) -> None:
    model = build(family, layers=4)
    with tp.attach(model, "uniform", keep=0.5) as attached:
        model(**inputs(family, model))
        assert attached.report.grids == GRIDS[family]


@torch.no_grad()
def test_molmo_has_rotary_embeddings_of_two_kinds() -> None:
    """A token that is numbered anew would be turned by the table of the other layers."""
    model = build("molmo2", layers=4)
    recipe: dict[str, Any] = {"version": 1, "name": "anew", "stages": [{"place": {"before_layer": 2}}]}
    recipe["stages"][0] |= {"scheduler": {"type": "fixed", "keep": 0.5}, "scorer": "norm", "positions": "renumber"}
    with pytest.raises(UnsupportedModelError, match=r"not supported for Molmo 2, whose types of layers have rotary"):
        tp.attach(model, recipe)


@torch.no_grad()
def test_minicpm_may_join_patches_once() -> None:
    """``downsample_mode="4x"`` leaves four times the tokens, which no configuration tells: then no grid is claimed."""
    model = build("minicpmv4_6", layers=4)
    batch = inputs("minicpmv4_6", model, rows=[Row(images=sizes("minicpmv4_6")[:1])])
    ids = batch["input_ids"]
    at = int((ids == model.config.image_token_id)[0].nonzero()[0])
    more = torch.full((1, 48), model.config.image_token_id)
    longer = torch.cat([ids[:, :at], more, ids[:, at:]], 1)
    call = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer), "downsample_mode": "4x"}
    with tp.attach(model, "random", keep=0.5) as attached:
        model(**call)
        assert attached.report.total == (64,)
        assert isinstance(attached.report.grids[0][0], UnknownGrid)
    model.config.downsample_mode = "4x"
    with tp.attach(model, "random", keep=0.5) as attached:
        model(**{**call, "downsample_mode": None})
        assert attached.report.grids == (((1, 8, 8),),)


def test_a_tower_whose_patches_nobody_names() -> None:
    model = build("perception_lm", layers=4)
    model.config.vision_config.architecture = "vit_of_ones_own"
    with tp.attach(model, "feather") as attached, torch.no_grad():
        with pytest.raises(InputError, match="architecture 'vit_of_ones_own' of the tower does not tell"):
            model(**inputs("perception_lm", model))
        assert attached.report.recipe == "feather"
