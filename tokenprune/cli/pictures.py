"""Picture files, opened the way people see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: Path, option: str = "--image") -> Image:
    """The picture at `path`: RGB, turned upright, transparency on white; of an animation the first frame.

    Raises:
        InputError: no such file, a folder, no picture, or one that breaks off.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; expected a picture file")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                clear = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{option}: no such file: {path}") from None
    except UnidentifiedImageError:
        raise InputError(f"{option}: {path} is not a picture that Pillow can read") from None
    except Image.DecompressionBombError:
        raise InputError(f"{option}: {path} has too many pixels; scale it down first") from None
    except PermissionError:
        raise InputError(f"{option}: no permission to read {path}") from None
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow's decoders raise these on files that break off or are damaged.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{option}: {path} is damaged: {reason}") from None
