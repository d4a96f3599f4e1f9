"""Videos as a promise: the contract, grids, budgets by frame, what is not pruned, memory, reports and pictures."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from family_models.tiny import IMAGE, VIDEO
from kinds import KINDS as RECIPES
from kinds import fixed, recipe, stage
from matrix import ALL, Cell, pairwise, run_on
from memory import Memory
from PIL import Image
from torch import Tensor
from videos import KINDS, Clip, build_video, grids_of, video_subject

import tokenprune as tp
from tokenprune.core.grids import ClassToken
from tokenprune.errors import InputError
from tokenprune.families.adapter import VisionRow
from tokenprune.families.catalogue import adapters
from tokenprune.plot.kept import plot_kept
from tokenprune.testing import check_family
from tokenprune.testing.checks import Subject

families = pytest.mark.parametrize("family", KINDS)
CLIPS = (Clip(), Clip(before=5, images=1, after=5))
"""A video of four frames; another one, and a picture."""
EAGER = pairwise([cell for cell in ALL if cell.attention == "eager" and cell.batch == "ragged"])


@cache
def model_of(family: str, attention: Any = "sdpa") -> Any:
    return build_video(family, attention=attention)


@cache
def subject_of(family: str, attention: Any = "sdpa", clips: tuple[Clip, ...] = CLIPS) -> Subject:
    return video_subject(family, model_of(family, attention), clips)


@torch.no_grad()
def report_of(subject: Subject, asked: Any, inputs: Any = None) -> Any:
    with subject.attach(asked) as attached:
        subject.model(**(subject.batch if inputs is None else inputs))
    return attached.report


@pytest.mark.in_turn(3)
@families
def test_videos_keep_the_contract(family: str) -> None:
    """Recipes of every kind, batch and row, caches and modes, against the masked reference."""
    subject = video_subject(family, build_video(family, layers=4), CLIPS)
    found = check_family(subject.model, subject.batch, rows=subject.rows)
    assert found.of("holds") == tuple(finding.check for finding in found), str(found)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(
    ("family", "cell"), [(family, cell) for turn, family in enumerate(KINDS) for cell in EAGER[turn % 4 :: 4]], ids=str
)
def test_cells_in_turn_with_eager_attention(family: str, cell: Cell) -> None:
    run_on(cell, subject_of(family, "eager"))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL, ids=str)
@families
def test_all_cells(family: str, cell: Cell) -> None:
    clips = CLIPS if cell.batch == "ragged" else CLIPS[:1]
    run_on(cell, subject_of(family, cell.attention, clips))


@families
def test_each_video_and_picture_has_its_grid(family: str) -> None:
    clips = (Clip(frames=(3, 3)), Clip(frames=(3,), images=1))
    told = report_of(subject_of(family, clips=clips), RECIPES["after_vision"]).grids
    assert told == tuple(grids_of(family, clip) for clip in clips)
    assert [list(map(type, own)) for own in told] == [list(map(type, grids_of(family, clip))) for clip in clips]


# ------------------------------------------------------------------------------------------------- budgets


def by_frame(family: str, grouper: Any, clip: Clip) -> tuple[int, ...]:
    more = {} if grouper is None else {"grouper": grouper}
    asked = recipe("halved", stage("after_vision", fixed(0.5), scorer="norm", sampler="top_k", **more))
    return report_of(subject_of(family, clips=(clip,)), asked).by_frame()[0]


@families
def test_budgets_are_shared_or_each_frames_own(family: str) -> None:
    clip = Clip(frames=(4, 4))
    size = KINDS[family].frame - (family == "video_llava")  # its class tokens are groups of their own
    shared, each = by_frame(family, None, clip), by_frame(family, "frame", clip)
    assert len(shared) == len(each) == 8
    assert {abs(count - size / 2) <= 0.5 for count in each} == {True}
    assert max(shared) - min(shared) > 2, "the norm alone would have shared alike"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_onevision", "llava_next_video"])
def test_budgets_of_each_video(family: str) -> None:
    size = KINDS[family].frame
    counts = by_frame(family, "image", Clip(frames=(4, 4)))
    assert [abs(sum(own) - 2 * size) <= 1 for own in (counts[:4], counts[4:])] == [True, True]
    assert max(counts) - min(counts) > 2


# ------------------------------------------------------------------------------------------------- what stays as it is


@families
def test_timestamps_separators_and_position_ids_stay(family: str) -> None:
    """Every text token reaches the last layer, at the place where the untouched model has it; so do the survivors."""
    subject = subject_of(family)
    model, inputs, vision = subject.model, subject.row(1), None
    seen: list[tuple[Tensor, Tensor]] = []
    hook = (
        model.get_decoder()
        .layers[7]
        .register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append((kwargs["position_embeddings"][0], args[0])), with_kwargs=True
        )
    )
    with torch.no_grad():
        model(**inputs)
    deltas = getattr(model.model, "rope_deltas", None)
    report = report_of(subject, recipe("half", stage(3, fixed(0.4), scorer="random")), inputs)
    hook.remove()
    (plain, _), (pruned, hidden) = seen
    ids = inputs["input_ids"][0]
    vision = Subject(model, inputs).vision[0]
    kept = vision.nonzero().flatten()[report.stages[0].kept[0]]
    there = torch.cat([(~vision).nonzero().flatten(), kept]).sort().values
    assert hidden.shape[1] == len(there) < len(ids)
    assert torch.equal(pruned[0], plain[0, there])
    if deltas is not None:
        assert torch.equal(model.model.rope_deltas, deltas) and bool((deltas != 0).any())


def test_pictures_and_videos_may_follow_each_other_without_words() -> None:
    subject = subject_of("llava_next_video", clips=(Clip(images=1),))
    ids = subject.batch["input_ids"]
    at = 3 + 36  # the word between the two
    assert ids[0, at] not in (IMAGE, VIDEO) and ids[0, at - 1] == VIDEO and ids[0, at + 1] == IMAGE
    inputs = {**subject.batch, "input_ids": torch.cat([ids[:, :at], ids[:, at + 1 :]], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert report_of(subject, RECIPES["after_vision"], inputs).grids == (grids_of("llava_next_video", Clip(images=1)),)


def test_a_run_of_video_is_told_from_pictures_of_as_many_tokens() -> None:
    """Four frames of LLaVA-OneVision, halved along both sides, are as many tokens as one picture without tiles."""
    base = model_of("llava_onevision").model
    run, newline = 37, (*[False] * 36, True)
    row = VisionRow((run, run), None, newline * 2, None, None, (False, True))
    picture, *video = (
        adapters()["llava_onevision"].grids(base, row)[0],
        *adapters()["llava_onevision"].grids(base, row)[2:],
    )
    assert picture == (1, 6, 6) and video == [(4, 3, 3), (1, 1, 1)] and isinstance(video[1], ClassToken)


@pytest.mark.parametrize(
    ("family", "newline", "message"),
    [
        ("llava_onevision", [False] * 37, "expected a video that ends in image_newline, got 37 vision tokens"),
        ("llava_onevision", [*[False] * 35, True], "expected whole frames of 3 x 3 = 9 vision tokens, got 35 in one"),
        ("llava_next_video", [False] * 37, "expected whole frames of 3 x 3 = 9 vision tokens, got 37 in one video"),
        ("video_llava", [False] * 25, "expected whole frames of 1 x 26 = 26 vision tokens, got 25 in one video"),
        ("llava_next", [False] * 25, "LLaVA-NeXT has no video"),
    ],
)
def test_half_a_video_is_told(family: str, newline: list[bool], message: str) -> None:
    base = model_of("llava_next_video" if family == "llava_next" else family).model
    with pytest.raises(InputError, match=message):
        adapters()[family].grids(base, VisionRow((len(newline),), None, tuple(newline), None, None, (True,)))


# ------------------------------------------------------------------------------------------------- hundreds of frames

FRAMES = 300
BOUNDED: dict[str, Any] = {
    **{name: name for name in ("evs", "dycoke", "vidcom2", "vcast", "recency", "fastv", "pyramiddrop", "uniform")},
    # Pairs of tokens within frames alone.
    "divprune by frame": recipe("far", stage("after_vision", fixed(0.1), sampler="max_min", grouper="frame")),
}


@pytest.fixture(scope="module")
def long_video() -> Any:
    """A video of Qwen2.5-VL, 4800 vision tokens, and its features made once."""
    subject = video_subject("qwen2_5_vl", build_video("qwen2_5_vl", layers=4), [Clip(frames=(FRAMES,))])
    with torch.no_grad():
        pooled = subject.model.get_video_features(subject.batch["pixel_values_videos"], subject.batch["video_grid_thw"])
    return subject, {"video": pooled}


def peak(long_video: Any, asked: Any) -> int:
    """The most bytes that a stage holds at once."""
    subject, features = long_video
    batch = {name: value for name, value in subject.batch.items() if name != "pixel_values_videos"}
    peaks = []
    with subject.attach(asked) as attached, torch.no_grad(), ExitStack() as hooks:
        for one in attached.engine.pipeline.stages:
            running = Memory()
            peaks.append(running)
            begin = one.register_forward_pre_hook(lambda *_, running=running: running.__enter__() and None)
            end = one.register_forward_hook(lambda *_, running=running: running.__exit__(None, None, None))
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        subject.model(**batch, mm_encoder_outputs=features, logits_to_keep=1)
    assert attached.report.total == (16 * FRAMES,)
    return max(running.peak for running in peaks)


def bound(tokens: int, width: int) -> int:
    """Bytes of two copies of the tokens, and of two tables that say which frame each token is of."""
    return 2 * 4 * tokens * (width + FRAMES)


@pytest.mark.parametrize("name", BOUNDED)
def test_hundreds_of_frames_take_memory_in_proportion(long_video: Any, name: str) -> None:
    assert peak(long_video, BOUNDED[name]) < bound(16 * FRAMES, 64)


def test_the_bound_is_far_below_a_matrix_of_all_pairs(long_video: Any) -> None:
    """Methods that compare all pairs of tokens go over it, as docs/models.md says."""
    assert bound(16 * FRAMES, 64) < 4 * (16 * FRAMES) ** 2 / 6
    assert peak(long_video, "divprune") > 4 * (16 * FRAMES) ** 2


# ------------------------------------------------------------------------------------------------- report and pictures


@families
def test_reports_and_pictures_show_frames(family: str) -> None:
    clip = Clip(frames=(4,))
    report = report_of(subject_of(family, clips=(clip,)), RECIPES["deep"])
    counts = report.by_frame()
    frame, first = KINDS[family].frame, int(family == "video_llava")  # where the class token stands
    for own, told in zip(counts, report.stages, strict=True):
        kept = [n for n in told.kept[0].tolist() if n < 4 * frame and n % frame >= first]
        assert own == tuple(sum(n // frame == number for n in kept) for number in range(4))
    separate = all(grid[0] == 1 for grid in report.grids[0])
    told = f"    in 4 {'pictures' if separate else 'frames'}: {' '.join(map(str, counts[0]))}\n"
    assert told in str(report)
    figure = plot_kept([Image.new("RGB", (8, 8))] * 4, report)
    captions = [text.get_text() for axes in figure.axes for text in axes.texts] + [
        axes.get_title(loc=side) for axes in figure.axes for side in ("left", "right", "center")
    ]
    assert len(figure.axes) == 4 * (1 + len(report.stages))
    assert any(("image 4" if separate else "video 1, step 4") in caption for caption in captions)
    assert any(f"{counts[0][3]} of {KINDS[family].frame - (family == 'video_llava')} here" in each for each in captions)


def test_many_frames_are_summed_up(long_video: Any) -> None:
    subject, features = long_video
    batch = {name: value for name, value in subject.batch.items() if name != "pixel_values_videos"}
    report = report_of(subject, "evs", {**batch, "mm_encoder_outputs": features, "logits_to_keep": 1})
    (counts,) = report.by_frame()
    assert f"    in 300 frames: {min(counts)} to {max(counts)} each\n" in str(report)
    assert tp.__version__ and sum(counts) == report.stages[0].sizes[0]
