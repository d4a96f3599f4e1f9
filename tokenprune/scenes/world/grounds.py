"""Grounds of scenes: textures without any object, as zero-mean unit-variance height fields.

Photographic grounds are crops of CC0 photographs (see `assets/grounds/LICENSES.md`); procedural ones are
functions of scene coordinates, so every ground can be drawn at any resolution.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import reduce
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

PHOTOGRAPHIC = ("brick", "grass", "gravel", "wood")
PROCEDURAL = ("stripes", "checks", "clouds")
GROUNDS = PHOTOGRAPHIC + PROCEDURAL

UNITS = 96
"""Side of a scene in its own coordinates; one unit is one pixel of the model's input."""

_FOLDER = Path(__file__).parents[1] / "assets" / "grounds"
_PHOTO_SIDE = 256
_CROP_SIDE = 192
_STEPS = (_PHOTO_SIDE - _CROP_SIDE) // 2 + 1


@lru_cache(maxsize=16)
def _photograph(name: str, half: bool) -> Array:
    """Luminance `[256, 256]`, or its 2x2 box average `[128, 128]` (point sampling would alias)."""
    with Image.open(_FOLDER / f"{name}.jpg") as image:
        pixels = np.asarray(image.convert("L"), dtype=np.float32)
    return reduce(pixels, "(row y) (column x) -> row column", "mean", y=2, x=2) if half else pixels


def _photographic(name: str, rng: np.random.Generator, side: int) -> Array:
    row, column = rng.integers(0, _STEPS, 2)
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    if side == UNITS:
        crop = _photograph(name, True)[row : row + side, column : column + side]
    else:
        full = _photograph(name, False)[2 * row : 2 * row + _CROP_SIDE, 2 * column : 2 * column + _CROP_SIDE]
        crop = np.asarray(Image.fromarray(full).resize((side, side), Image.Resampling.BICUBIC))
    crop = np.rot90(crop, turns)
    return crop[:, ::-1] if mirrored else crop


@lru_cache(maxsize=8)
def _axis(side: int) -> Array:
    """Pixel centres `[side]` in scene units."""
    return ((np.arange(side, dtype=np.float32) + 0.5) * UNITS / side).astype(np.float32)


@lru_cache(maxsize=32)
def _interpolation(knots: int, side: int) -> Array:
    """Smooth interpolation matrix `[side, knots]` from a coarse grid to pixels."""
    position = (np.arange(side, dtype=np.float32) + 0.5) / side * (knots - 1)
    low = np.minimum(position.astype(np.int64), knots - 2)
    weight = position - low
    weight = weight * weight * (3 - 2 * weight)
    matrix = np.zeros((side, knots), np.float32)
    rows = np.arange(side)
    matrix[rows, low] = 1 - weight
    matrix[rows, low + 1] = weight
    return matrix


def _clouds(rng: np.random.Generator, side: int) -> Array:
    field = np.zeros((side, side), np.float32)
    for knots, amplitude in ((6, 1.0), (12, 0.6), (24, 0.4)):
        up = _interpolation(knots, side)
        field += amplitude * (up @ rng.standard_normal((knots, knots), dtype=np.float32) @ up.T)
    return field


def _rotated_axes(rng: np.random.Generator, side: int) -> tuple[Array, Array, float]:
    angle, period = rng.uniform(0, np.pi), rng.uniform(7, 14)
    x, y = _axis(side)[None, :], _axis(side)[:, None]
    frequency = np.float32(2 * np.pi / period)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return frequency * (cos * x + sin * y), frequency * (cos * y - sin * x), float(rng.uniform(0, 6))


def _stripes(rng: np.random.Generator, side: int) -> Array:
    along, _, phase = _rotated_axes(rng, side)
    return np.clip(2 * np.sin(along + np.float32(phase)), -1, 1)


def _checks(rng: np.random.Generator, side: int) -> Array:
    along, across, phase = _rotated_axes(rng, side)
    return np.clip(4 * np.sin(along + np.float32(phase)) * np.sin(across), -1, 1)


def texture(name: str, rng: np.random.Generator, side: int) -> Array:
    """Texture `[side, side]` float32 with mean 0 and standard deviation 1.

    The draws from `rng` do not depend on `side`: one seed gives the same ground at every resolution.
    """
    if name in PHOTOGRAPHIC:
        field = _photographic(name, rng, side)
    else:
        field = {"stripes": _stripes, "checks": _checks, "clouds": _clouds}[name](rng, side)
    field = field - field.mean()
    return np.clip(field / (field.std() + 1e-6), -2.5, 2.5).astype(np.float32)
