"""The door for pictures: every mode of Pillow as people see it, or refused by name; nothing else gets in."""

from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

GREY = np.linspace(0, 255, 24 * 32).reshape(24, 32).astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T.reshape(24, 32), 255 - GREY], -1)


def seen(path: Path) -> np.ndarray:
    picture = open_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def assert_looks_like(path: Path, wanted: np.ndarray, off: float = 1.0) -> None:
    wanted = np.repeat(wanted[..., None], 3, -1) if wanted.ndim == 2 else wanted
    assert seen(path).shape == wanted.shape
    assert abs(seen(path) - wanted).mean() <= off


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "deep.jp2"])
def test_grey_of_sixteen_bits(name: str, tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / name)
    assert_looks_like(tmp_path / name, GREY, 0.6)


def test_grey_whose_zero_is_white(tmp_path: Path) -> None:
    """Pillow turns it over with 8 bits, and with 16 it does not."""
    deep = Image.fromarray((255 - GREY).astype(np.uint16) * 257)
    deep.save(tmp_path / "white.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "white.tif") as file:
        assert file.tag_v2[262] == 0
    assert_looks_like(tmp_path / "white.tif", GREY, 0)


def test_one_grey_of_sixteen_bits_is_transparent(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "clear.png", transparency=0)
    wanted = GREY.copy()
    wanted[wanted == 0] = 255
    assert_looks_like(tmp_path / "clear.png", wanted, 0)


def test_real_numbers_from_black_to_white(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32) / 255).save(tmp_path / "real.tif")
    assert_looks_like(tmp_path / "real.tif", GREY, 0)


@pytest.mark.parametrize(
    ("numbers", "name", "message"),
    [
        (GREY.astype(np.float32), "big.tif", r"holds real numbers from 0 to 255; expected 0 \(black\) to 1 \(white\)"),
        (np.full((4, 4), np.nan, np.float32), "nan.tif", "holds real numbers from nan to nan"),
        (GREY.astype(np.int32) * 9999, "whole.tif", "holds whole numbers of 32 bits and does not tell which is white"),
        (GREY.astype(np.float32) / 255, "light.pfm", "holds real numbers of 32 bits and does not tell"),
    ],
)
def test_numbers_without_a_white_are_refused(numbers: np.ndarray, name: str, message: str, tmp_path: Path) -> None:
    Image.fromarray(numbers).save(tmp_path / name, format="PPM" if name.endswith("pfm") else None)
    with pytest.raises(InputError, match=rf"^--image: .*{name} {message}"):
        open_picture(tmp_path / name)


def test_ink_and_lab(tmp_path: Path) -> None:
    smooth = Image.fromarray(COLOUR).resize((32, 24))
    smooth.convert("CMYK").save(tmp_path / "ink.tif")
    assert_looks_like(tmp_path / "ink.tif", COLOUR)
    smooth.convert("CMYK").save(tmp_path / "ink.jpg", quality=95)
    assert_looks_like(tmp_path / "ink.jpg", COLOUR, 25)  # JPEG blurs the noise of the middle channel
    screen, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(smooth, screen, lab, outputMode="LAB")
    assert made is not None
    made.save(tmp_path / "lab.tif")
    assert_looks_like(tmp_path / "lab.tif", COLOUR, 2)


def test_ink_goes_through_its_profile_where_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "ink.tif", icc_profile=b"nonsense")
    assert_looks_like(tmp_path / "ink.tif", np.full((4, 4, 3), (255, 0, 0)), 0)
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of RGB: it cannot hold for ink
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "ink.tif", icc_profile=wrong)
    assert_looks_like(tmp_path / "ink.tif", np.full((4, 4, 3), (255, 0, 0)), 0)

    def press(picture: Image.Image, inks: object, screen: object, outputMode: str) -> Image.Image:
        assert picture.mode == "CMYK" and isinstance(inks, ImageCms.ImageCmsProfile)
        return Image.new(outputMode, picture.size, "maroon")

    monkeypatch.setattr(ImageCms, "profileToProfile", press)  # profiles of presses cannot be shipped
    assert_looks_like(tmp_path / "ink.tif", np.full((4, 4, 3), (128, 0, 0)), 0)


def tiff(path: Path, width: int, data: bytes, *, bits: tuple[int, ...], extra: int | None = None) -> None:
    """A TIFF file of one row that Pillow can read and not write."""
    tags = [(256, 3, width), (257, 3, 1), (259, 3, 1), (262, 3, 1), (277, 3, len(bits)), (278, 3, 1)]
    tags += [(258, 3, bits[0] if len(bits) == 1 else bits[0] | bits[1] << 16), (279, 4, len(data))]
    tags += [] if extra is None else [(338, 3, extra)]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    body = b"".join(
        struct.pack("<HHII", tag, kind, len(bits) if tag == 258 else 1, value)
        for tag, kind, value in sorted([*tags, (273, 4, start)])
    )
    path.write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1) + body + bytes(4) + data)


def test_grey_of_twelve_bits(tmp_path: Path) -> None:
    tiff(tmp_path / "x.tif", 2, bytes([0xFF, 0xF8, 0x00]), bits=(12,))  # 4095 and 2048
    assert_looks_like(tmp_path / "x.tif", np.array([[255, 128]]), 0)


def test_grey_that_is_multiplied_by_what_covers(tmp_path: Path) -> None:
    tiff(tmp_path / "x.tif", 2, bytes([100, 255, 0, 0]), bits=(8, 8), extra=1)
    with Image.open(tmp_path / "x.tif") as file:
        assert file.mode == "La"
    assert_looks_like(tmp_path / "x.tif", np.array([[100, 255]]), 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "YCbCr"])
def test_opaque_modes(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(COLOUR)
    picture, name = source.convert(mode), "x.tif" if mode in ("RGBX", "YCbCr") else "x.png"
    picture.save(tmp_path / name)
    assert_looks_like(tmp_path / name, np.asarray(picture.convert("RGB")), 0)


@pytest.mark.parametrize("name", ["la.png", "pa.png", "rgba.png", "index.png", "colour.png", "first.gif", "still.webp"])
def test_transparency_lies_on_white(name: str, tmp_path: Path) -> None:
    """Red (grey where there is no colour) of which the left half is not there."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    path, red = tmp_path / name, (255, 0, 0)
    if name == "la.png":
        clear.convert("LA").save(path)
        red = (76, 76, 76)
    elif name in ("pa.png", "index.png"):
        picture = Image.new("P", (8, 8), 1)
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.paste(0, (0, 0, 4, 8))
        picture.save(path, transparency=bytes([0, 255]) if name == "pa.png" else 0)
    elif name == "colour.png":
        Image.alpha_composite(Image.new("RGBA", (8, 8), "black"), clear).convert("RGB").save(
            path, transparency=(0, 0, 0)
        )
    elif name == "first.gif":
        clear.save(path, save_all=True, append_images=[Image.new("RGBA", (8, 8), "blue")])
    else:
        clear.save(path, lossless=True)
    wanted = np.full((8, 8, 3), red)
    wanted[:, :4] = 255
    assert_looks_like(path, wanted, 0)


def test_animation_begins_with_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert seen(tmp_path / "a.png")[0, 0].tolist() == [255, 0, 0]
    still = Image.new("RGB", (8, 8), "lime")
    still.save(tmp_path / "b.png", save_all=True, append_images=frames, default_image=True)
    assert seen(tmp_path / "b.png")[0, 0].tolist() == [255, 0, 0]


UPRIGHT = [(COLOUR, f"turned.{kind}") for kind in ("jpg", "png", "webp", "tif")]
UPRIGHT += [(pixels, f"turned.{kind}") for pixels in (GREY, GREY.astype(np.uint16) * 257) for kind in ("png", "tif")]


@pytest.mark.parametrize(("lying", "name"), UPRIGHT, ids=lambda value: str(getattr(value, "dtype", value)))
@pytest.mark.parametrize(("turn", "quarters"), [(3, 2), (6, 3), (8, 1)])
def test_pictures_stand_upright(lying: np.ndarray, name: str, turn: int, quarters: int, tmp_path: Path) -> None:
    """Grey TIFF files have Pillow map them into memory where it may, and then mix up width and height."""
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(lying).save(tmp_path / name, exif=exif)
    upright = np.rot90(COLOUR if lying.ndim == 3 else GREY, quarters)
    assert_looks_like(tmp_path / name, upright, 0.6 if name.endswith(("png", "tif")) else 40)


def test_unreadable_exif_leaves_a_picture_as_it_lies(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOUR)
    picture.save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    assert_looks_like(tmp_path / "x.png", COLOUR, 0)


def test_too_many_pixels_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(InputError, match=r"^--image: .*big.png has too many pixels; scale it down first$"):
        open_picture(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(tmp_path / "big.png").size == (100, 100)


def test_a_bomb_of_text_is_refused(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("a", "x" * 70_000_000, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(InputError, match=r"text\.png is damaged: Decompressed data too large"):
        open_picture(tmp_path / "text.png")


def test_postscript_runs_no_program(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.eps")
    with pytest.raises(InputError, match=r"x\.eps is PostScript, a program and no picture"):
        open_picture(tmp_path / "x.eps")


def test_a_truncated_picture_is_told(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    with pytest.raises(InputError, match=r"^--image: .*/cut\.jpg is damaged: image file is truncated"):
        open_picture(tmp_path / "cut.jpg")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.ppm", "x.jp2", "x.ico"])
def test_damaged_files_are_told_in_one_line(name: str, tmp_path: Path) -> None:
    """Cut off anywhere, or with bytes changed: a picture, or our error of one line, and nothing else."""
    chance, path = random.Random(name), tmp_path / name
    Image.fromarray(COLOUR).save(path)
    whole = path.read_bytes()
    refused = opened = 0
    for _ in range(60):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.5 else whole)
        for _ in range(chance.randrange(1, 6) if data else 0):
            data[chance.randrange(min(len(data), chance.choice((40, 10**9))))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            assert open_picture(path).mode == "RGB"
        except InputError as error:
            told = str(error)
            refused += "\n" not in told and str(path) in told
        else:
            opened += 1
    assert refused >= 15 and refused + opened == 60
