"""Video files: which frames are taken, that they look as in a player, and what is said of files that are none."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `video` is not installed")
from clips import STEP, write_clip

import tokenprune as tp
from tokenprune.core.clip import spread
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

UPRIGHT = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
"""The matrix of an MP4 that turns nothing."""
CLOCKWISE = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000 00000000 00000000 40000000")


def middle(frame: Any) -> float:
    """Brightness in the middle of a frame."""
    pixels = np.asarray(frame, dtype=float)
    return float(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].mean())


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.mpg", "mpeg2video")])
def test_frames_are_the_middles_of_equal_parts(name: str, codec: str, tmp_path: Path) -> None:
    clip = tp.open_video(write_clip(tmp_path / name, 20, fps=25, codec=codec), 4)
    assert (clip.indices, clip.total, clip.fps) == ((2, 7, 12, 17), 20, 25.0)
    assert [middle(frame) for frame in clip.frames] == pytest.approx([STEP * index for index in clip.indices], abs=4)
    assert clip.array().shape == (4, 48, 64, 3)
    assert clip.metadata()["duration"] == 0.8 and clip.metadata()["frames_indices"] == [2, 7, 12, 17]


def test_a_short_clip_is_taken_whole(tmp_path: Path) -> None:
    clip = tp.open_video(write_clip(tmp_path / "a.mp4", 3))
    assert clip.indices == (0, 1, 2)
    assert [spread(total, 4) for total in (1, 4, 5, 400)] == [[0], [0, 1, 2, 3], [0, 1, 3, 4], [50, 150, 250, 350]]


def test_time_steps_show_the_first_of_their_frames(tmp_path: Path) -> None:
    clip = tp.open_video(write_clip(tmp_path / "a.mp4", 7), 7)
    assert clip.steps(4) == [clip.frames[number] for number in (0, 1, 3, 5)]
    assert clip.steps(7) == list(clip.frames)


def test_a_clip_is_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 2)
    data = path.read_bytes()
    assert data.count(UPRIGHT) == 2  # of the film, and of its track
    at = data.rindex(UPRIGHT)
    path.write_bytes(data[:at] + CLOCKWISE + data[at + len(UPRIGHT) :])
    (frame, _) = tp.open_video(path).frames
    assert frame.size == (48, 64)
    pixels = np.asarray(frame.convert("L"))
    assert pixels[4, -4] > 200 and max(pixels[4, 4], pixels[-4, 4], pixels[-4, -4]) < 50


def test_pixels_are_square(tmp_path: Path) -> None:
    assert tp.open_video(write_clip(tmp_path / "a.mp4", 2, aspect=2)).frames[0].size == (128, 48)


def test_a_file_that_breaks_off_ends_there(tmp_path: Path) -> None:
    """Its frames are spread anew over what can be decoded."""
    data = write_clip(tmp_path / "a.mpg", 30, size=(320, 240), codec="mpeg2video").read_bytes()
    (tmp_path / "cut.mpg").write_bytes(data[: len(data) * 2 // 3])
    clip = tp.open_video(tmp_path / "cut.mpg", 4)
    assert len(clip.frames) == len(clip.indices) == 4 and clip.total < 30
    assert all(before < after for before, after in pairwise(clip.indices))
    assert [middle(frame) for frame in clip.frames] == pytest.approx([STEP * index for index in clip.indices], abs=4)


def test_more_packets_than_frames_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some packets hold no frame of their own, the count of packets is no count of frames."""
    path = write_clip(tmp_path / "a.mp4", 20)
    monkeypatch.setattr("tokenprune.core.clip._length", lambda *_: (40, 10.0))
    clip = tp.open_video(path, 4)
    assert (clip.indices, clip.total) == ((2, 7, 12, 17), 20)
    assert [middle(frame) for frame in clip.frames] == pytest.approx([STEP * index for index in clip.indices], abs=4)


def test_a_name_in_another_script_harms_nothing(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 3, codec="libx264", title="titletitle")
    data = path.read_bytes()
    assert data.count(b"titletitle") == 1
    path.write_bytes(data.replace(b"titletitle", b"title\xba\xb1\xb2\xb3\xb4"))
    assert tp.open_video(path).total == 3


def test_a_list_of_other_files_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's own lists would open what they name, on this machine and others."""
    write_clip(tmp_path / "a.mpg", 3, codec="mpeg2video")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mpg\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"list\.mp4 is no video that PyAV can read"):
        tp.open_video("list.mp4")


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    """Cut off or changed anywhere: frames, or our error of one line, and nothing else."""
    chance = np.random.default_rng(0)
    whole = write_clip(tmp_path / "a.mp4", 6).read_bytes()
    told = []
    for number in range(40):
        data = bytearray(whole[: chance.integers(len(whole))] if number % 2 else whole)
        for at in chance.integers(len(data), size=8) if data else ():
            data[at] = chance.integers(256)
        (tmp_path / "b.mp4").write_bytes(data)
        try:
            assert tp.open_video(tmp_path / "b.mp4").frames
        except InputError as error:
            told.append(str(error))
    assert 10 <= len(told) < 40
    assert all("\n" not in line and "b.mp4" in line for line in told)


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.mp4").write_text("no video " * 40)
    clip = write_clip(tmp_path / "a.mpg", 3, codec="mpeg2video")
    for name, told in {
        "none.mp4": "no such file",
        ".": "is a folder",
        "text.mp4": "is no video that PyAV can read, or damaged",
    }.items():
        with pytest.raises(InputError, match=f"^video: .*{told}"):
            tp.open_video(tmp_path / name)
    with pytest.raises(InputError, match="expected at least 1 frame, got 0"):
        tp.open_video(clip, 0)
    with pytest.raises(InputError, match=r"a\.mpg is not a picture .*; a video goes with --video, in Python"):
        open_picture(clip)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"PyAV.* is not installed: pip install 'tokenprune-vlm\[video\]'"):
        tp.open_video(clip)
