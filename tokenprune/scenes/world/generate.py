"""Scenes: a few coloured shapes, and often a plate with a code, placed freely on a textured ground.

A scene is a list of things in continuous coordinates, so it can be drawn at any resolution; `scene(seed, index)`
always returns the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from tokenprune.scenes.world.grounds import GROUNDS, PHOTOGRAPHIC, PROCEDURAL, UNITS, texture
from tokenprune.scenes.world.plates import Plate, make_plate, paint_plate

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "orange": (246, 138, 24),
    "yellow": (248, 224, 40),
    "green": (40, 158, 52),
    "cyan": (64, 212, 222),
    "blue": (36, 72, 214),
    "purple": (142, 48, 178),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: dict[str, float] = {"small": 6.0, "medium": 8.7, "large": 12.0}
"""Radius of the circle around a shape, in scene units."""

CELLS = 5
"""Cells a side of the grid that answers name. 12 vision tokens a side are no multiple of 5, so that no lattice of them
lines up with the cells."""
CELL = UNITS / CELLS
_MARGIN = 1.6
_OUTLINE = 1.1

TRAIN_SEEDS = range(1_000_000)
TEST_SEEDS = range(1_000_000, 2_000_000)
"""Splits differ in the seed, never only in the index: they cannot share a scene."""


@dataclass(frozen=True)
class SceneObject:
    """One shape: names of its attributes, centre and radius in scene units, angle in radians, exact colour."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def row(self) -> int:
        """1-based row of the cell that contains the centre."""
        return int(self.y // CELL) + 1

    @property
    def column(self) -> int:
        """1-based column of the cell that contains the centre."""
        return int(self.x // CELL) + 1

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in scene units (0 to 96)."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Knobs:
    """Settings of the generator: how hard scenes are. The defaults are those of the embedded model's training.

    Attributes:
        objects: least and largest number of shapes, 1 to 12.
        themed: share of scenes in which many shapes have a colour or a form in common.
        plated: share of scenes with a code.
        contrast: strength of the ground's texture, 0 to 3; 1 as trained, 0 plain.
        sizes: sizes that occur.

    Raises:
        ValueError: a knob out of its range.
    """

    objects: tuple[int, int] = (3, 8)
    themed: float = 0.7
    plated: float = 0.6
    contrast: float = 1.0
    sizes: tuple[str, ...] = tuple(SIZES)

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 1 <= low <= high <= 12:
            raise ValueError(f"objects: expected 1 <= least <= largest <= 12, got {self.objects}")
        for name in ("themed", "plated"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.contrast <= 3:
            raise ValueError(f"contrast: expected 0 to 3, got {self.contrast}")
        if not self.sizes or not set(self.sizes) <= set(SIZES):
            raise ValueError(f"sizes: expected some of {', '.join(SIZES)}, got {self.sizes}")


KNOBS = Knobs()


@dataclass(frozen=True)
class Scene:
    """A generated scene; `image` is what the model sees, `render` draws it larger for people."""

    seed: int
    index: int
    ground: str
    objects: tuple[SceneObject, ...]
    plate: Plate | None = None
    contrast: float = 1.0

    @property
    def photographic(self) -> bool:
        return self.ground in PHOTOGRAPHIC

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """Picture `[96, 96, 3]` uint8."""
        return self.render()

    def render(self, side: int = UNITS) -> NDArray[np.uint8]:
        """Draw the scene as `[side, side, 3]` uint8, antialiased."""
        canvas = _paint_ground(self, side)
        if self.plate is not None:
            paint_plate(canvas, self.plate)
        for item in self.objects:
            _paint_object(canvas, item, side)
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def scene(seed: int, index: int = 0, knobs: Knobs = KNOBS) -> Scene:
    """The scene `index` of the stream `seed`; take seeds from `TRAIN_SEEDS` or `TEST_SEEDS`."""
    rng = np.random.default_rng((seed, index))
    ground = str(rng.choice(PHOTOGRAPHIC if rng.random() < 0.5 else PROCEDURAL))
    plate = make_plate(rng) if rng.random() < knobs.plated else None
    least, largest = knobs.objects
    objects: list[SceneObject] = []
    for colour, shape in _choose_pairs(rng, int(rng.integers(least, largest + 1)), knobs.themed):
        item = _place(rng, colour, shape, knobs.sizes, objects, plate)
        if item is not None:
            objects.append(item)
    return Scene(seed, index, ground, tuple(objects), plate, knobs.contrast)


def _choose_pairs(rng: np.random.Generator, count: int, themed: float) -> list[tuple[str, str]]:
    """Distinct (colour, shape) pairs; most scenes have a theme, so that attributes repeat and distract."""
    colours, shapes = list(COLOURS), list(SHAPES)
    theme, repeats = rng.random(), int(rng.integers(2, 6))
    chosen: list[tuple[str, str]] = []
    if theme < themed * 4 / 7:
        colour = colours[rng.integers(len(colours))]
        chosen += [(colour, shapes[i]) for i in rng.permutation(len(shapes))[: min(repeats, count)]]
    elif theme < themed:
        shape = shapes[rng.integers(len(shapes))]
        chosen += [(colours[i], shape) for i in rng.permutation(len(colours))[: min(repeats, count)]]
    while len(chosen) < count:
        colour, shape = colours[rng.integers(len(colours))], shapes[rng.integers(len(shapes))]
        if chosen and rng.random() < 0.35:
            shared = chosen[rng.integers(len(chosen))]
            colour, shape = (shared[0], shape) if rng.random() < 0.5 else (colour, shared[1])
        if (colour, shape) not in chosen:
            chosen.append((colour, shape))
    return [chosen[i] for i in rng.permutation(count)]


def _coordinate(rng: np.random.Generator, radius: float) -> float:
    """A centre inside the picture: cell first, so that all rows and columns are equally likely, then a place in it."""
    start = rng.integers(CELLS) * CELL
    low = max(start + _MARGIN, radius + _OUTLINE)
    high = min(start + CELL - _MARGIN, UNITS - radius - _OUTLINE)
    return float(rng.uniform(low, high))


def _place(
    rng: np.random.Generator,
    colour: str,
    shape: str,
    sizes: tuple[str, ...],
    others: list[SceneObject],
    plate: Plate | None,
) -> SceneObject | None:
    """A free place for the object, or None when the picture is full."""
    for attempt in range(60):
        size = sizes[rng.integers(len(sizes))] if attempt < 40 else min(sizes, key=SIZES.__getitem__)
        radius = SIZES[size] * rng.uniform(0.94, 1.06)
        x, y = _coordinate(rng, radius), _coordinate(rng, radius)
        if plate is not None and _from_box(x, y, plate.box) < radius + 2.5:
            continue
        if all((o.x - x) ** 2 + (o.y - y) ** 2 > (o.radius + radius + 1.5) ** 2 for o in others):
            red, green, blue = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 5, 3), 0, 255).tolist()
            angle = float(rng.uniform(-0.16, 0.16))
            return SceneObject(colour, shape, size, x, y, float(radius), angle, (red, green, blue))
    return None


def _from_box(x: float, y: float, box: tuple[float, float, float, float]) -> float:
    """Distance of a point from a box, 0 inside."""
    return math.hypot(max(box[0] - x, 0.0, x - box[2]), max(box[1] - y, 0.0, y - box[3]))


def _paint_ground(item: Scene, side: int) -> NDArray[np.float32]:
    """Muted ground `[side, side, 3]`: low saturation and contrast, so that objects stay clear to a person."""
    rng = np.random.default_rng((item.seed, item.index, 1))
    field = texture(item.ground, rng, side)
    base = rng.uniform(95, 160) + rng.uniform(-14, 14, 3)
    amplitude = rng.uniform(14, 26) * item.contrast
    return base.astype(np.float32) + np.float32(amplitude) * field[:, :, None]


def _distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], r: float) -> NDArray[np.float32]:
    """Signed distance (negative inside) to a shape of radius `r` around the origin, y pointing down."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - 0.92 * r
    elif shape == "ring":
        distance = np.abs(np.sqrt(x * x + y * y) - 0.7 * r) - 0.26 * r
    elif shape == "square":
        distance = np.maximum(ax, ay) - 0.78 * r
    elif shape == "diamond":
        distance = (1.5 * ax + ay - r) * 0.5547
    elif shape == "triangle":
        distance = np.maximum(0.866 * ax - 0.5 * y, y) - 0.5 * r
    else:
        bar = 0.3 * r
        distance = np.minimum(np.maximum(ax - 0.92 * r, ay - bar), np.maximum(ay - 0.92 * r, ax - bar))
    return distance.astype(np.float32, copy=False)


def _window(item: SceneObject, side: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Pixel window around an object and the signed distance (scene units) in it."""
    scale = side / UNITS
    reach = item.radius + 2 * _OUTLINE
    left, right = max(int((item.x - reach) * scale), 0), min(int((item.x + reach) * scale) + 2, side)
    top, bottom = max(int((item.y - reach) * scale), 0), min(int((item.y + reach) * scale) + 2, side)
    x = ((np.arange(left, right, dtype=np.float32) + 0.5) / scale - item.x)[None, :]
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / scale - item.y)[:, None]
    cos, sin = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    distance = _distance(item.shape, cos * x + sin * y, cos * y - sin * x, item.radius)
    return slice(top, bottom), slice(left, right), distance


def _paint_object(canvas: NDArray[np.float32], item: SceneObject, side: int) -> None:
    rows, columns, distance = _window(item, side)
    scale = np.float32(side / UNITS)
    outline = np.clip(0.5 - (distance - _OUTLINE) * scale, 0, 1)[:, :, None] * np.float32(0.85)
    inside = np.clip(0.5 - distance * scale, 0, 1)[:, :, None]
    area = canvas[rows, columns]
    area += outline * (np.float32(22) - area)
    area += inside * (np.array(item.rgb, np.float32) - area)


def owners(item: Scene, grid: int = 12) -> NDArray[np.int64]:
    """Which object covers each cell of a `grid` x `grid` lattice: `[grid, grid]`, index + 1, 0 ground, -1 unclear.

    A cell belongs to the object that covers at least a quarter of it; a cell that an object only grazes is unclear.
    """
    span = UNITS // grid
    result = np.zeros((grid, grid), np.int64)
    for number, thing in enumerate(item.objects, start=1):
        rows, columns, distance = _window(thing, UNITS)
        cover = np.zeros((UNITS, UNITS), np.float32)
        cover[rows, columns] = distance < _OUTLINE / 2
        share = reduce(cover, "(row y) (column x) -> row column", "mean", y=span, x=span)
        result[share >= 0.25] = number
        result[(share > 0.04) & (share < 0.25) & (result == 0)] = -1
    for number, thing in enumerate(item.objects, start=1):
        result[int(thing.y // span), int(thing.x // span)] = number
    return result


__all__ = [
    "CELLS",
    "COLOURS",
    "GROUNDS",
    "SHAPES",
    "SIZES",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "UNITS",
    "Knobs",
    "Plate",
    "Scene",
    "SceneObject",
    "owners",
    "scene",
]
