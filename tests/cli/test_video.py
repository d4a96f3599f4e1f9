"""Questions about video files: what a processor is given, what is told and drawn, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av", reason="the extra `video` is not installed")
from clips import write_clip
from videos import KINDS, build_video

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.families.chat import Chat
from tokenprune.plot.film import plot_film

ASKED = "where is the cat ?"


class Frames:
    """Makes Qwen2-VL's inputs of frames without torchvision, in which transformers' own processor works.

    Two frames are one time step of 4 x 4 vision tokens; their numbers are noise.
    """

    video_token = "<video>"
    video_processor = SimpleNamespace(do_center_crop=False, do_pad=False)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))

    def __call__(self, *, images: Any, text: list[str], videos: list[Any], **more: Any) -> dict[str, Any]:
        assert images is None and text == [f"USER: <video>\n{ASKED} ASSISTANT:"]
        (self.video,), self.more = videos, more
        kind = KINDS["qwen2_vl"]
        placed, pixels = kind.video(len(self.video) // 2, torch.Generator().manual_seed(0))
        ids = torch.cat([torch.arange(40, 45), placed, torch.arange(50, 56)])[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kind.beside(ids), **pixels}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return build_video("qwen2_vl")


def test_ask_takes_a_video_where_it_takes_a_picture(qwen: Any, clip: Path) -> None:
    processor = Frames()
    answer = tp.ask(qwen, processor, tp.open_video(clip, 8), ASKED, "fastv", keep=0.5, max_new_tokens=2)
    assert answer.report is not None
    assert answer.report.grids == (((4, 4, 4),),) and answer.report.stages[0].kept.shape == (1, 32)
    assert processor.video.shape == (8, 48, 64, 3)
    (told,) = processor.more["video_metadata"]
    assert (told["frames_indices"], told["fps"], told["total_num_frames"]) == ([1, 3, 6, 8, 11, 13, 16, 18], 10.0, 20)
    assert processor.more["do_sample_frames"] is False, "frames are chosen already"


def test_videos_stand_before_pictures_where_a_template_says_how(qwen: Any) -> None:
    told: list[Any] = []
    processor = SimpleNamespace(chat_template="…", apply_chat_template=lambda talk, **_: told.extend(talk))
    Chat("", qwen, processor).prompt(ASKED, images=2, videos=1)
    assert [part["type"] for part in told[0]["content"]] == ["video", "image", "image", "text"]
    with pytest.raises(InputError, match="without a chat template Qwen2-VL takes a video or pictures, not both"):
        Chat("", qwen, SimpleNamespace()).prompt(ASKED, images=1, videos=1)


def test_the_command_tells_frames_and_draws_them(
    qwen: Any, clip: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.answers.load", lambda name, **_: Chat(name, qwen, Frames()))
    asked = ("run", "--video", clip, ASKED, "--frames", 4, "--recipe", "fastv", "--keep", "0.5", "--model", "mine")
    told = json.loads(cli(*asked, "--max-new-tokens", 2, "--save-plot", tmp_path / "film.png", "--json").out)
    assert told["video"] == {"file": str(clip), "frames": [2, 7, 12, 17], "total": 20, "fps": 10.0}
    assert (told["images"], told["total"], told["final"]) == ([], 32, 16)
    with Image.open(tmp_path / "film.png") as drawn:
        assert drawn.width > 600
    assert "clip.mp4 (4 of 20 frames)" in " ".join(cli(*asked, "--max-new-tokens", 2).out.split())


def report(steps: int, *stages: list[int]) -> Any:
    made = [
        SimpleNamespace(place="before_layer: 2", layer=2, kept=torch.tensor([kept]), merged=torch.tensor([[-1]]))
        for kept in stages
    ]
    return SimpleNamespace(stages=made, grids=(((steps, 2, 2),),), total=(4 * steps,))


def test_a_film_shows_every_step_with_its_own_frame(clip: Path) -> None:
    frames = tp.open_video(clip, 3).frames
    figure = plot_film(frames, report(3, [0, 4, 5, 11], [4]), title="a film")
    assert len(figure.axes) == 3 * 3
    notes = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert notes[:6] == ["step 1", "step 2", "step 3", "1 of 4", "2 of 4", "1 of 4"]
    assert notes[6:] == ["0 of 4", "1 of 4", "0 of 4"]
    shown = [axes.images[0].get_array() for axes in figure.axes]
    for number, frame in enumerate(frames):
        assert np.allclose(shown[number], np.asarray(frame) / 255)
        assert np.allclose(shown[4][:24, :64], shown[1][:24, :64]), "both upper cells of the second frame are kept"
    assert "4 of 12" in [text.get_text() for text in figure.texts]


def test_a_long_film_is_thinned_out_and_a_wrong_one_refused(clip: Path) -> None:
    frames = tp.open_video(clip, 20).frames
    figure = plot_film(frames, report(20, [0]), most=5)
    steps = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text().startswith("step")]
    assert steps == ["step 1", "step 5", "step 9", "step 13", "step 17"]
    with pytest.raises(InputError, match="plot: got 3 pictures for the grids"):
        plot_film(frames[:3], report(20, [0]))
    with pytest.raises(InputError, match="no sample 1 in a report of 1"):
        plot_film(frames, report(20, [0]), row=1)


def test_mistakes_are_told_in_one_line(clip: Path, cli: Callable[..., Any], picture: Path) -> None:
    for arguments, told in {
        ("--frames", 4): "--frames goes with --video",
        ("--video", clip, picture, "what is it ?"): "--video is for a prompt of its own; leave pictures out",
        ("--video", clip): "a video needs a question: tokenprune run --video clip.mp4 'What happens?'",
        ("--video", picture.parent / "none.mp4", "what is it ?"): "--video: no such file: ",
        ("--video", clip, "what is it ?"): "LLaVA-1.5 takes no video; docs/models.md names the families that do",
        ("--video", clip, "what is it ?", "-r", "visionthink"): "--video: visionthink may ask twice",
        (clip, "what is it ?"): "is not a picture that Pillow can read; a video goes with --video",
    }.items():
        outcome = cli("run", *arguments)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1), arguments
        assert told in outcome.err


def works() -> bool:
    """Whether torchvision is installed, and of the same build as torch."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a build for another torch fails in many ways
        return False
    return True


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_torchvision_is_asked_for_by_name(clip: Path, cli: Callable[..., Any], qwen_folder: Path) -> None:
    outcome = cli("run", "--video", clip, ASKED, "--model", qwen_folder, "--device", "cpu")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "videos for Qwen2-VL need torchvision, which is not installed: pip install" in outcome.err


@pytest.mark.skipif(not works(), reason="transformers' processors of videos need torchvision")
def test_a_folder_with_its_own_processor(clip: Path, cli: Callable[..., Any], qwen_folder: Path) -> None:
    asked = ("run", "--video", clip, ASKED, "--model", qwen_folder, "--recipe", "uniform", "--keep", "0.5")
    told = json.loads(cli(*asked, "--device", "cpu", "--json").out)
    steps = len(told["video"]["frames"]) // 2
    assert steps == 4 and told["total"] % steps == 0 and told["final"] == told["total"] // 2
