"""Pictures of kept tokens: cells at the right place, readable captions, the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tokenprune.core.frames import frames_of
from tokenprune.core.grids import Tiles
from tokenprune.errors import InputError
from tokenprune.plot.kept import plot_kept
from tokenprune.plot.style import save

GOLDEN = Path(__file__).parent / "cli" / "golden" / "kept.png"
"""Written anew by `TOKENPRUNE_WRITE_GOLDEN=1 pytest tests/test_plot.py`; look at it before you commit it."""


def report(grids: list[tuple[int, int, int]], *stages: tuple[int | None, list[int], list[int]]) -> Any:
    total = sum(t * h * w for t, h, w in grids)
    made = [
        SimpleNamespace(
            place="after_vision", layer=layer, kept=torch.tensor([[*kept, -1]]), merged=torch.tensor([[*merged, -1]])
        )
        for layer, kept, merged in stages
    ]
    return SimpleNamespace(stages=made, grids=(tuple(grids),), total=(total,))


def picture(width: int = 96, height: int = 96) -> Image.Image:
    """A red disc on a green to blue ramp."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([np.zeros_like(x), 200 - 150 * y // height, 80 + 150 * x // width], -1).astype(np.uint8)
    disc = (x - width * 0.3) ** 2 + (y - height * 0.35) ** 2 < (0.18 * width) ** 2
    pixels[disc] = (220, 40, 40)
    return Image.fromarray(pixels)


def sample() -> tuple[Image.Image, Any]:
    disc = [12 * y + x for y in range(12) for x in range(12) if (x - 3.1) ** 2 + (y - 3.7) ** 2 < 8]
    some = sorted({*disc, *range(3, 144, 7)} - {5, 50, 120})
    return picture(), report([(1, 12, 12)], (2, some, [5, 50, 120]), (5, disc, [100]))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def test_captions_tell_place_and_counts() -> None:
    image, told = sample()
    kept = [stage.kept.numel() - 1 for stage in told.stages]
    assert texts(plot_kept(image, told)) == [
        "input",
        "144 vision tokens",
        "before layer 2",
        f"kept {kept[0]} of 144 + 3 merged",
        "before layer 5",
        f"kept {kept[1]} of 144 + 1 merged",
    ]


def test_kept_cells_stay_clear_and_dropped_cells_fade() -> None:
    """The drawn pixels themselves: cell (1, 2) of a 4 x 6 grid on a picture of another shape."""
    image = picture(180, 80)
    figure = plot_kept(image, report([(1, 4, 6)], (None, [1 * 6 + 2], [])))
    shown = np.asarray(figure.axes[1].images[0].get_array())
    original = np.asarray(image, dtype=np.float32) / 255
    same = np.isclose(shown, original).all(-1)
    expected = np.zeros((80, 180), dtype=bool)
    expected[20:40, 60:90] = True
    assert (same == expected).all()
    assert shown[~expected].min() > 0.6  # pale
    assert figure.axes[1].texts[0].get_text() == "after vision"


def test_several_pictures_have_a_line_each_and_cells_of_their_own() -> None:
    images = [picture(), picture(120, 60)]
    figure = plot_kept(images, report([(1, 4, 4), (1, 3, 6)], (3, [0, 15, 16, 33], [])))
    assert len(figure.axes) == 4
    assert texts(figure) == [
        "input",
        "34 vision tokens · image 1",
        "before layer 3",
        "kept 4 of 34 · 2 of 16 here",
        "image 2",
        "2 of 18 here",
    ]


@pytest.mark.parametrize("images", [1, 3])
def test_time_steps_of_a_video_share_a_picture_or_have_their_own(images: int) -> None:
    frames = frames_of([(3, 2, 2)], images)
    assert [frame.start for frame in frames] == [0, 4, 8]
    assert [frame.image for frame in frames] == ([0, 0, 0] if images == 1 else [0, 1, 2])
    assert frames[1].mask([3, 4, 7, 8]).tolist() == [[True, False], [False, True]]


def test_newline_tokens_of_tiles_are_not_drawn() -> None:
    overview, tiles = frames_of([(1, 2, 2), Tiles(1, 2, 4)], images=1)
    assert (overview.image, tiles.image, tiles.start, tiles.width) == (0, 0, 4, 3)
    # 7 and 11 are the newline tokens at the row ends.
    assert tiles.mask([4, 7, 8, 11]).tolist() == [[True, False, False], [True, False, False]]


def test_many_pictures_are_thinned_out() -> None:
    figure = plot_kept([picture(16, 16)] * 40, report([(1, 2, 2)] * 40, (1, [0], [])), most=3)
    assert len(figure.axes) == 3 * 2


def test_pictures_that_do_not_fit_are_refused() -> None:
    image, told = sample()
    with pytest.raises(InputError, match=r"^plot: got 2 pictures for the grids \[\(1, 12, 12\)\]$"):
        plot_kept([image, image], told)
    with pytest.raises(InputError, match=r"^plot: no sample 1 in a report of 1$"):
        plot_kept(image, told, row=1)


def test_title_is_text_and_fits(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """No mathematics between dollars, no warning about a script that the font lacks, no overflow."""
    image, told = sample()
    figure = plot_kept(image, told, title=r"costs $\frac{1}$ or $2? 猫 " + "long " * 100)
    save(figure, tmp_path / "title.png")
    assert figure.texts[0].get_text().endswith("…")
    assert not recwarn.list


def test_png_is_the_same_every_time(tmp_path: Path) -> None:
    """Also in another process with another hash seed."""
    image, told = sample()
    first = save(plot_kept(image, told, title="title"), tmp_path / "a.png").read_bytes()
    again = save(plot_kept(image, told, title="title"), tmp_path / "b.png").read_bytes()
    assert first == again
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; import test_plot as t; image, told = t.sample();"
        "t.save(t.plot_kept(image, told, title='title'), sys.argv[1])"
    )
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.png"), str(here), str(here.parent)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert (tmp_path / "c.png").read_bytes() == first


def test_golden_picture(tmp_path: Path) -> None:
    """Within what another release of the font renderer may change."""
    image, told = sample()
    path = save(plot_kept(image, told, title="golden · where is the red disc?"), tmp_path / "kept.png")
    if os.environ.get("TOKENPRUNE_WRITE_GOLDEN"):
        GOLDEN.write_bytes(path.read_bytes())
    with Image.open(path) as new, Image.open(GOLDEN) as old:
        assert new.size == old.size
        difference = np.abs(np.asarray(new, dtype=float) - np.asarray(old, dtype=float))
    assert difference.mean() < 1.0


def test_save_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, told = sample()
    figure = plot_kept(image, told)
    with pytest.raises(InputError, match=r"^cannot write .*/none/a\.png: No such file or directory$"):
        save(figure, tmp_path / "none" / "a.png")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(InputError, match=r"^cannot write .*/a\.png: No space left on device$"):
        save(figure, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_plot_needs_neither_pyplot_nor_matplotlib_to_import() -> None:
    code = "import sys, tokenprune.plot.kept; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize(("width", "height"), [(60, 600), (96, 96), (600, 60)])
def test_pictures_of_any_shape_show_whole_captions_and_use_their_room(width: int, height: int) -> None:
    report = SimpleNamespace(
        stages=[
            SimpleNamespace(place="before_layer: 2", layer=2, kept=torch.arange(16)[None], merged=torch.zeros(1, 2))
        ]
        * 3,
        grids=(((1, 4, 4),),),
        total=(16,),
    )
    figure = plot_kept(picture(width, height), report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    room = figure.bbox
    for axes in figure.axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
        assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in boxes)
        drawn = axes.get_window_extent(canvas.get_renderer())
        assert abs(drawn.width / drawn.height - width / height) < 0.02 * width / height
    wide = max(axes.get_window_extent().width for axes in figure.axes)
    assert wide > (0.9 * room.width if width > height else 0)
    tops = {round(axes.get_window_extent().y1) for axes in figure.axes}
    assert len(tops) == (4 if width > height else 1), "wide pictures stand below each other"
