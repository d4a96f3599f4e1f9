"""Random question files and pictures: each is read, or refused in one line a mistake."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from tokenprune.cli.question_file import read_cases
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

CELLS: list[Any] = [
    *("a.png", "gone.png", "..", "/", "", " ", "What?", "yes", "a" * 300, "<image>"),
    *("\x00", "\x85", "\u2028", "\ud800", "宽", "a\nb", '"', ",", "\\"),
    *(None, True, 0, -1, 1.5, float("nan"), 10**400, [], {}, ["a.png"], {"a": 1}),
]
NAMES = ["image", "question", "answer", "task", "difficulty", "Image", "images", "", "id", "\x85"]
PIECES = [
    *(b"{", b"}", b'"', b",", b"\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"null", b"\\ud800", b"\xc2\x85"),
    *(b"[" * 5000, b"9" * 5000),
]
ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32-be"]
MODES = [
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBX", "RGBa"),
    *("I", "I;16", "I;16B", "F"),
]
FORMATS = [
    *("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "PCX", "ICO", "JPEG2000", "SGI", "DDS", "MSP", "XBM"),
    *("SPIDER", "EPS", "PDF"),
]


def one_file(rng: Random) -> list[str]:
    """One question file: rows of right and odd cells, as JSON lines or CSV, in some encoding, bytes changed or not."""
    ending = rng.choice([".jsonl", ".csv"])
    data = (_json_lines(rng) if ending == ".jsonl" else _table(rng)).encode(rng.choice(ENCODINGS), "replace")
    if rng.random() < 0.5:
        data = _changed(rng, data, PIECES)
    with TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        Image.new("RGB", (4, 4)).save(images / "a.png")
        file = Path(folder, f"asked{ending}")
        file.write_bytes(data)
        refused, cases = "", []
        try:
            cases = read_cases(file, images)
        except InputError as error:
            refused = str(error)
        if refused:
            lines = refused.split("\n")
            assert all(line.startswith((f"{file}:", "--questions: ")) for line in lines), refused
            assert len(refused.splitlines()) == len(lines), f"more lines than mistakes: {refused[:300]}"
            assert len({line.split(" error: ")[0] for line in lines}) == len(lines), "a line is told twice"
            return [f"{ending}: refused, {'one mistake' if len(lines) == 1 else 'several mistakes'}"]
        assert cases and all(case.question.strip() and case.answer.strip() for case in cases)
        for case in cases:
            assert case.picture().mode == "RGB"
    return [f"{ending}: read"]


def one_picture(rng: Random) -> list[str]:
    """One picture file of any mode and format, whole, cut, with bytes changed, or nothing but bytes."""
    what, data = rng.choice(["whole", "cut", "changed", "bytes"]), b""
    if what == "bytes":
        data = rng.randbytes(rng.randint(0, 400))
    while not data and what != "bytes":
        data = _picture(rng)
    if what == "cut":
        data = data[: rng.randrange(len(data))]
    elif what == "changed":
        data = _changed(rng, data, [b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", rng.randbytes(8)])
    with TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        path.write_bytes(data)
        said, refused, picture = io.StringIO(), "", None
        with redirect_stderr(said):
            try:
                picture = open_picture(path)
            except InputError as error:
                refused = str(error)
        if picture is None:
            assert refused.startswith(f"--image: {path} ")
            assert len(refused.splitlines()) == 1, refused
        else:
            assert picture.mode == "RGB" and min(picture.size) > 0
        assert not said.getvalue(), said.getvalue()
    return [f"{what}: {'opened' if picture else 'refused in one line'}"]


def _row(rng: Random) -> dict[str, Any]:
    row: dict[str, Any] = {"image": "a.png", "question": f"What is {rng.randint(0, 30)}?", "answer": "yes"}
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        row[rng.choice(NAMES)] = rng.choice(CELLS)
    if rng.random() < 0.1:
        del row[rng.choice(list(row))]
    return row


def _json_lines(rng: Random) -> str:
    lines = [json.dumps(_row(rng), ensure_ascii=rng.random() < 0.5) for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.2:
        lines.insert(rng.randint(0, len(lines)), json.dumps(rng.choice(CELLS)))
    return rng.choice(["\n", "\r\n", "\n\n"]).join(lines)


def _table(rng: Random) -> str:
    import csv

    rows = [_row(rng) for _ in range(rng.randint(0, 6))]
    names = ["image", "question", "answer", *rng.sample(NAMES, rng.choice([0, 0, 1, 2]))]
    rng.shuffle(names)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=rng.choice(",,,,;\t"))
    writer.writerow(names)
    for row in rows:
        cells = ["" if row.get(name) is None else str(row[name])[:200] for name in names]
        writer.writerow(cells[: rng.choice([len(cells)] * 9 + [1])])
    return out.getvalue()


def _changed(rng: Random, data: bytes, pieces: list[bytes]) -> bytes:
    """`data` with a few bytes put in, taken out or repeated."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice([0, 0, 1, 4, 30]))
        data = data[:start] + rng.choice([*pieces, b"", data[start:end] * 2, rng.randbytes(1)]) + data[end:]
    return data


def _picture(rng: Random) -> bytes:
    """A picture as a file; empty where the format does not take the mode."""
    size = rng.randint(1, 12), rng.randint(1, 12)
    grey = Image.frombytes("L", size, rng.randbytes(size[0] * size[1]))
    mode, out = rng.choice(MODES), io.BytesIO()
    try:
        picture = grey.convert("RGB").convert("LAB") if mode == "LAB" else grey.convert(mode)
        options: dict[str, Any] = {}
        if rng.random() < 0.2:
            exif = Image.Exif()
            exif[0x0112] = rng.randint(0, 9)
            options["exif"] = exif
        if rng.random() < 0.2:
            options |= {"save_all": True, "append_images": [picture.copy()]}
        picture.save(out, rng.choice(FORMATS), **options)
    except Exception:  # whatever Pillow's encoders raise
        return b""
    return out.getvalue()
