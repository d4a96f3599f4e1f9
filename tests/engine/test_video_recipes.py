"""Videos on real models: frames of one video, and frames that come one by one, through the masked reference."""

from __future__ import annotations

import pytest
import torch
from families import Batch, Row, build, inputs
from family_models import MODELS
from family_models.tiny import VIDEO
from pruned import TOLERANCE, run_both

import tokenprune as tp

RECIPES = ("evs", "dycoke", "vidcom2", "vcast", "fastvid", "holitom", "prunevid")


def video_batch(model: object, frames: int = 4) -> Batch:
    """One prompt with a video of so many frames of 4 × 4 vision tokens, as Qwen2.5-VL takes it."""
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id  # type: ignore[attr-defined]
    tokens = torch.full((frames * 16,), VIDEO)
    ids = torch.cat([torch.tensor([1, 5, 6, start]), tokens, torch.tensor([end, 7, 8, 9, 10, 11])])[None]
    random = torch.Generator().manual_seed(0)
    still = torch.randn(1, 64, 96, generator=random).expand(frames, -1, -1).clone()
    still[1:, ::3] += torch.randn(frames - 1, 22, 96, generator=random)  # a third of the picture moves
    return Batch(
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == VIDEO).long(),
            "pixel_values_videos": still.flatten(0, 1),
            "video_grid_thw": torch.tensor([[frames, 8, 8]]),
            "second_per_grid_ts": torch.ones(1),
        },
        [0],
        MODELS["qwen2_5_vl"],
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_video_of_one_grid(name: str) -> None:
    model = build("qwen2_5_vl")
    difference, (got, expected), report = run_both(model, video_batch(model), name, max_new_tokens=3)
    assert torch.equal(got, expected) and difference < TOLERANCE
    assert report.grids == (((4, 4, 4),),)
    if name == "evs":  # the first frame stays whole, or as much of it as a quarter of four frames holds
        assert report.stages[0].kept[0].tolist() == list(range(16))
    if name == "dycoke":
        assert report.stages[0].kept[0, :16].tolist() == list(range(16)) and report.stages[0].sizes == (30,)


@pytest.mark.parametrize("name", RECIPES)
def test_frames_that_come_one_by_one(name: str) -> None:
    """As with Qwen3-VL, which puts words between them."""
    model = build("qwen3_vl")
    batch = inputs("qwen3_vl", model, rows=[Row(images=[(8, 8)] * 4), Row(images=[(8, 12)] * 2)])
    difference, (got, expected), report = run_both(model, batch, name, max_new_tokens=3)
    assert torch.equal(got, expected) and difference < TOLERANCE
    if name == "evs":
        first = report.stages[0].kept
        assert (first[0] < 16).all() and (first[1] < 24).all()


def test_newer_screenshots_keep_more() -> None:
    model = build("qwen2_5_vl")
    batch = inputs("qwen2_5_vl", model, rows=[Row(images=[(8, 8)] * 3)])
    with tp.attach(model, "recency", keep=21) as attached, torch.no_grad():
        model(**batch)
    kept = attached.report.stages[0].kept[0]
    assert [int(((kept >= i * 16) & (kept < i * 16 + 16)).sum()) for i in range(3)] == [3, 6, 12]
