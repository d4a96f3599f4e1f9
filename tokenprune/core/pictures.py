"""Picture files, opened the way people see them: the one door for every command that shows a model a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.core.clip import SUFFIXES
from tokenprune.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = Image | NDArray[np.uint8]
    """Whatever a processor takes: a Pillow image, or an array ``[H, W, 3]``."""
    Shown = Picture | str | PathLike[str]
    """A picture, or the path of its file."""

PLAIN = ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBa")
"""Modes of Pillow that it converts to RGB as people see them."""
PHOTOMETRIC, BITS = 262, 258
"""TIFF tags: whether 0 is black (1) or white (0), and bits a channel."""


def picture_suffixes() -> frozenset[str]:
    """Ends of the names of files that Pillow opens, in lower case and with their dot."""
    from PIL import Image

    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def as_pictures(given: Shown | Sequence[Shown], option: str = "pictures") -> list[Picture]:
    """What people hand over as one picture or several: files are opened, Pillow images and arrays stay as they are.

    Raises:
        InputError: as `open_picture`.
    """
    if isinstance(given, str | PathLike) or not isinstance(given, Sequence):
        given = [given]
    return [open_picture(Path(each), option) if isinstance(each, str | PathLike) else each for each in given]


def open_picture(path: Path, option: str = "--image") -> Image:
    """The picture at `path`: RGB, turned upright, transparency on white; of an animation the first frame.

    Grey of 16 bits, and of real numbers from 0 to 1, is brought to 8 bits, black to black and white to white. Profiles
    that a file brings are applied where its colours mean nothing without one (CMYK): RGB and grey are taken as sRGB,
    as the models' own loaders do.

    Raises:
        InputError: no such file, a folder, no picture, one that breaks off, one of too many pixels, or one whose
            numbers do not tell what is black and white.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if path.is_dir():
            raise InputError("is a folder; expected a picture file")
        with warnings.catch_warnings():
            # Of EXIF that is damaged, and from 89 million pixels on; from twice as many on Pillow raises.
            warnings.simplefilter("ignore")
            # By name, Pillow maps plain TIFF files into memory, and turned ones with width and height mixed up.
            with path.open("rb") as stream, Image.open(stream) as file:
                return _seen(file)
    except InputError as error:
        raise InputError(f"{option}: {path} {error}") from None
    except FileNotFoundError:
        raise InputError(f"{option}: no such file: {path}") from None
    except UnidentifiedImageError:
        video = "; a video goes with --video, in Python with tokenprune.open_video" * (path.suffix.lower() in SUFFIXES)
        raise InputError(f"{option}: {path} is not a picture that Pillow can read{video}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{option}: {path} has too many pixels; scale it down first") from None
    except PermissionError:
        raise InputError(f"{option}: no permission to read {path}") from None
    except MemoryError:
        raise
    except Exception as error:
        # What Pillow's decoders raise on files that break off or are damaged is of many classes.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{option}: {path} is damaged: {reason}") from None


def _seen(file: Image) -> Image:
    """An opened file as RGB.

    Raises:
        InputError: a picture of which nobody can say how it looks; the message lacks option and path.
    """
    from PIL import Image, ImageOps

    if file.format == "EPS":
        raise InputError("is PostScript, a program and no picture; save it as PNG")
    if file.info.get("default_image"):  # of an animated PNG: what programs show that know no animation
        file.seek(1)
    file.load()
    try:
        picture = ImageOps.exif_transpose(file)
    except Exception:
        picture = file  # what EXIF says is unreadable: viewers show such a picture as it lies
    picture = _eight_bits(picture, file)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode == "CMYK" and (profile := file.info.get("icc_profile")):
        picture = _through_profile(picture, profile)
    if picture.mode not in PLAIN:
        raise InputError(f"is of Pillow's mode {picture.mode!r}, which nobody can say how to show; save it as RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return picture.convert("RGB")


def _eight_bits(picture: Image, file: Image) -> Image:
    """`picture` with 8 bits a channel; Pillow itself would cut off what lies above 255.

    Raises:
        InputError: its numbers do not tell which is white.
    """
    import numpy as np
    from PIL import Image

    mode, tags = picture.mode, getattr(file, "tag_v2", {})
    if mode == "F" and file.format == "TIFF":
        numbers, white = np.asarray(picture), 1.0
        if not (numbers.min() >= 0.0 and numbers.max() <= 1.0):  # also where there is NaN
            told = f"real numbers from {numbers.min():g} to {numbers.max():g}"
            raise InputError(f"holds {told}; expected 0 (black) to 1 (white); save it with 8 or 16 bits")
    elif mode.startswith("I;16") or (mode == "I" and file.format in ("PNG", "PPM")):
        bits = tags.get(BITS, (16,))[0]
        numbers, white = np.asarray(picture), float(2**bits - 1)
    elif mode in ("I", "F"):
        kind = "real" if mode == "F" else "whole"
        raise InputError(f"holds {kind} numbers of 32 bits and does not tell which is white; save it with 8 or 16 bits")
    else:
        return picture
    share = np.clip(numbers.astype(np.float64) / white, 0.0, 1.0)
    if tags.get(PHOTOMETRIC) == 0:
        share = 1.0 - share
    made = Image.fromarray(np.rint(255.0 * share).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):  # the one grey that stands for nothing
        made.putalpha(Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8)))
    return made


def _through_profile(picture: Image, profile: bytes) -> Image:
    """Ink to sRGB, as the press means it; a profile that cannot be read is passed over, as viewers do."""
    from io import BytesIO

    from PIL import ImageCms

    try:
        inks, screen = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, inks, screen, outputMode="RGB") or picture
    except (ImageCms.PyCMSError, OSError):
        return picture
