"""Video files: some frames of one, spread evenly, as people see them.

PyAV decodes them, which the extra `video` brings. Only frames are read here; what a model makes of them is for its own
video processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FRAMES = 8
"""Frames that are taken of a video unless somebody says how many."""
SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp"))
"""Ends of the names of video files, to tell somebody who gives one for a picture."""
EXTRA = "pip install 'tokenprune-vlm[video]'"


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, all of one size; `tokenprune.ask` takes it where it takes a picture."""

    frames: tuple[Image, ...]
    indices: tuple[int, ...]
    """Which frames of the file these are, from 0."""
    total: int
    """Frames of the file."""
    fps: float | None
    """Frames of the file in a second, on average; None where it does not tell."""

    def array(self) -> NDArray[np.uint8]:
        """``[frames, H, W, 3]``."""
        import numpy as np

        return np.stack([np.asarray(frame) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """What a video processor of transformers asks for: it writes the times of frames into some prompts."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": None if self.fps is None else self.total / self.fps,
            "frames_indices": list(self.indices),
            "width": width,
            "height": height,
        }

    def steps(self, count: int) -> list[Image]:
        """The first frame of each of `count` time steps: a tower may make one step of several frames (Qwen-VL)."""
        return [self.frames[min(step * len(self.frames) // count, len(self.frames) - 1)] for step in range(count)]


def open_video(path: str | Path, frames: int = FRAMES, *, option: str = "video") -> Clip:
    """Some frames of the video at `path`: the middle of each of `frames` equal parts, or all where it has fewer.

    Frames are turned upright and have square pixels, as players show them. The whole file is decoded up to the last
    frame that is taken; only those that are taken stay in memory.

    Args:
        path: of the file; addresses of the network are not opened.
        frames: how many, at least 1.
        option: opens error messages.

    Raises:
        InputError: PyAV is not installed, no such file, a folder, no video, or one that is damaged.
    """
    path = Path(path)
    if frames < 1:
        raise InputError(f"{option}: expected at least 1 frame, got {frames}")
    try:
        import av
    except ImportError:
        raise InputError(f"{option}: PyAV, which opens video files, is not installed: {EXTRA}") from None
    try:
        if path.is_dir():
            raise InputError(f"{option}: {path} is a folder; expected a video file")
        with path.open("rb") as stream:
            count, fps = _length(av, stream)
        if not count:
            raise InputError(f"{option}: {path} holds no video")
        wanted = spread(count, frames)
        found, seen = _read(av, path, wanted)
        if len(found) < len(wanted) and found:  # packets that hold no frame of their own, or a file that breaks off
            count = seen
            wanted = spread(count, frames)
            found, _ = _read(av, path, wanted)
        if not found:
            raise InputError(f"{option}: {path} is damaged: no frame can be decoded")
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{option}: no such file: {path}") from None
    except PermissionError:
        raise InputError(f"{option}: no permission to read {path}") from None
    except Exception as error:  # of FFmpeg, and of what damage makes of numbers and names in a file
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{option}: {path} is no video that PyAV can read, or damaged: {reason}") from None
    return Clip(tuple(frame.resize(found[0].size) for frame in found), tuple(wanted), count, fps)


def spread(total: int, count: int) -> list[int]:
    """The middle of each of `count` equal parts of ``range(total)``; all of it where it is no longer than that."""
    count = min(total, count)
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]


def _open(av: Any, stream: Any) -> Any:
    """A container that reads from `stream` alone: a playlist that names other files or addresses opens none."""
    return av.open(stream, container_options={"protocol_whitelist": "none"}, metadata_errors="replace")


def _length(av: Any, stream: Any) -> tuple[int, float | None]:
    """Packets of the first video stream, which are its frames as a rule, and frames in a second."""
    with _open(av, stream) as container:
        if not container.streams.video:
            return 0, None
        video = container.streams.video[0]
        rate = video.average_rate or video.guessed_rate
        return sum(1 for packet in container.demux(video) if packet.size), float(rate) if rate else None


def _read(av: Any, path: Path, wanted: Sequence[int]) -> tuple[list[Image], int]:
    """The frames of these numbers that are there, and how many were decoded."""
    rest, found, seen = set(wanted), list[Any](), 0
    with path.open("rb") as stream, _open(av, stream) as container:
        for frame in _decoded(av, container):
            if seen in rest:
                found.append(_upright(frame, container.streams.video[0].sample_aspect_ratio))
            seen += 1
            if len(found) == len(wanted):
                break
    return found, seen


def _decoded(av: Any, container: Any) -> Iterator[Any]:
    """Frames in the order in which they are shown; a file that breaks off ends, as it does in a player."""
    video = container.streams.video[0]
    video.thread_type = "AUTO"
    shown = False
    try:
        for frame in container.decode(video):
            shown = True
            yield frame
    except av.error.FFmpegError:
        if not shown:
            raise


def _upright(frame: Any, aspect: Any) -> Image:
    """A decoded frame as a player shows it: pixels made square, and turned as the camera was held."""
    picture: Image = frame.to_image()
    if aspect and aspect != 1:
        picture = picture.resize((max(1, round(picture.width * float(aspect))), picture.height))
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
