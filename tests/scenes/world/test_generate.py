"""Scenes: reproducible, held apart, and what their objects say they are."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tokenprune.scenes.world.generate import (
    CELL,
    COLOURS,
    SHAPES,
    SIZES,
    TEST_SEEDS,
    TRAIN_SEEDS,
    UNITS,
    Knobs,
    owners,
    scene,
)
from tokenprune.scenes.world.grounds import GROUNDS, PHOTOGRAPHIC, texture
from tokenprune.scenes.world.plates import GLYPHS

SEED = TEST_SEEDS[2]


def test_same_seed_same_scene() -> None:
    for index in range(8):
        first, second = scene(SEED, index), scene(SEED, index)
        assert first == second
        assert np.array_equal(first.image, second.image)
    assert not np.array_equal(scene(SEED, 0).image, scene(SEED, 1).image)
    assert not np.array_equal(scene(SEED, 0).image, scene(SEED + 1, 0).image)


def test_order_of_making_does_not_matter() -> None:
    alone = scene(SEED, 5).image
    for index in range(5):
        _ = scene(SEED, index).image
    assert np.array_equal(scene(SEED, 5).image, alone)


def test_train_and_test_share_no_seed() -> None:
    assert not set(TRAIN_SEEDS) & {TEST_SEEDS[0], TEST_SEEDS[-1]}
    assert TRAIN_SEEDS.stop <= TEST_SEEDS.start or TEST_SEEDS.stop <= TRAIN_SEEDS.start


def test_training_refuses_held_out_seeds() -> None:
    from tokenprune.scenes.training.batches import training_batch

    with pytest.raises(ValueError, match="held out"):
        training_batch(TEST_SEEDS[0], 0, 1)


@pytest.mark.parametrize("index", range(0, 40, 5))
def test_objects_are_inside_apart_and_clear_of_answer_borders(index: int) -> None:
    item = scene(SEED, index)
    assert 1 <= len(item.objects) <= 8
    for number, thing in enumerate(item.objects):
        assert min(thing.box) >= 0 and max(thing.box) <= UNITS
        for centre in (thing.x, thing.y):
            assert 1.5 < centre % CELL < CELL - 1.5
        for other in item.objects[:number]:
            assert np.hypot(thing.x - other.x, thing.y - other.y) > thing.radius + other.radius


def test_all_attributes_rows_and_grounds_occur_equally_often() -> None:
    scenes = [scene(SEED, index) for index in range(600)]
    things = [thing for item in scenes for thing in item.objects]
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("row", range(1, 6)), ("column", range(1, 6))):
        shares = [sum(getattr(t, name) == v for t in things) / len(things) * len(values) for v in values]
        assert min(shares) > 0.7 and max(shares) < 1.35, (name, shares)
    assert {thing.size for thing in things} == set(SIZES)
    assert {item.ground for item in scenes} == set(GROUNDS)
    assert 0.4 < np.mean([item.photographic for item in scenes]) < 0.6
    assert set(range(3, 9)) <= {len(item.objects) for item in scenes}


def test_targets_and_plates_are_spread_evenly_over_thirds() -> None:
    scenes = [scene(SEED, index) for index in range(900)]
    things = [(thing.x, thing.y) for item in scenes for thing in item.objects]
    plates = [(item.plate.x, item.plate.y) for item in scenes if item.plate is not None]
    assert 0.5 < len(plates) / len(scenes) < 0.7
    for places, slack in ((things, 0.04), (plates, 0.06)):
        for axis in (0, 1):
            thirds = np.bincount([int(place[axis] // 32) for place in places], minlength=3) / len(places)
            assert np.abs(thirds - 1 / 3).max() < slack, (axis, thirds)


def test_plates_are_inside_and_clear_of_objects() -> None:
    for item in (scene(SEED, index) for index in range(120)):
        if item.plate is None:
            continue
        left, top, right, bottom = item.plate.box
        assert 0 <= left < right <= UNITS and 0 <= top < bottom <= UNITS
        for thing in item.objects:
            nearest = np.clip(thing.x, left, right), np.clip(thing.y, top, bottom)
            assert np.hypot(thing.x - nearest[0], thing.y - nearest[1]) > thing.radius


def test_letters_are_drawn_where_the_plate_says() -> None:
    """The blocks of each glyph are dark and the others light, read off the picture at a size where blocks are clear."""
    item = next(found for index in range(50) if (found := scene(SEED, index)).plate is not None)
    picture = item.render(960).astype(int).sum(2)
    for letter, (left, top, _, _) in zip(item.plate.code, item.plate.glyph_boxes, strict=True):
        for row, line in enumerate(GLYPHS[letter]):
            for column, mark in enumerate(line):
                y, x = int((top + (row + 0.5) * 2.4) * 10), int((left + (column + 0.5) * 2.4) * 10)
                assert (picture[y, x] < 200) == (mark == "#")


def test_knobs_turn() -> None:
    plain = [scene(SEED, i, Knobs(objects=(2, 2), plated=0, contrast=0, sizes=("large",))) for i in range(20)]
    for item in plain:
        assert item.plate is None and len(item.objects) <= 2 and {o.size for o in item.objects} == {"large"}
        assert np.ptp(item.image[0, :4].reshape(-1, 3), axis=0).max() <= 1 or min(o.y for o in item.objects) < 20
    assert all(scene(SEED, i, Knobs(plated=1)).plate is not None for i in range(20))
    repeated = [
        np.mean([len({o.colour for o in s.objects}) + len({o.shape for o in s.objects}) for s in scenes])
        for scenes in ([scene(SEED, i, Knobs((6, 6), themed=share)) for i in range(60)] for share in (0.0, 1.0))
    ]
    assert repeated[1] < repeated[0] - 0.3


@pytest.mark.parametrize(
    "knobs",
    [
        {"objects": (0, 3)},
        {"objects": (4, 3)},
        {"objects": (3, 13)},
        {"themed": 1.5},
        {"plated": -0.1},
        {"contrast": 9.0},
        {"sizes": ()},
        {"sizes": ("huge",)},
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}: expected"):
        Knobs(**knobs)


def test_pixels_at_the_centre_have_the_colour_of_the_object() -> None:
    for index in range(40):
        item = scene(SEED, index)
        for thing in item.objects:
            if thing.shape != "ring":
                pixel = item.image[int(thing.y), int(thing.x)].astype(int)
                nearest = min(COLOURS, key=lambda name: float(np.abs(pixel - COLOURS[name]).sum()))
                assert nearest == thing.colour


def test_render_is_the_same_scene_at_every_size() -> None:
    for index in range(6):
        item = scene(SEED, index)
        large = item.render(384).reshape(96, 4, 96, 4, 3).mean((1, 3))
        assert np.abs(large - item.image).mean() < 9


@pytest.mark.parametrize("name", GROUNDS)
def test_texture_is_normalised(name: str) -> None:
    for side in (96, 200):
        field = texture(name, np.random.default_rng(3), side)
        assert field.shape == (side, side) and field.dtype == np.float32
        assert abs(field.mean()) < 0.1 and 0.8 < field.std() < 1.05
    assert set(PHOTOGRAPHIC) < set(GROUNDS)


def test_owners_follow_objects() -> None:
    for index in range(20):
        item = scene(SEED, index)
        lattice = owners(item)
        assert lattice.shape == (12, 12)
        for number, thing in enumerate(item.objects, start=1):
            assert lattice[int(thing.y // 8), int(thing.x // 8)] == number
            rows, columns = np.nonzero(lattice == number)
            distance = np.hypot(rows * 8 + 4 - thing.y, columns * 8 + 4 - thing.x)
            assert distance.max() < thing.radius + 6


def test_generation_is_fast_enough_to_train_on() -> None:
    start = time.process_time()
    for index in range(200):
        _ = scene(SEED, index).image
    assert (time.process_time() - start) / 200 < 0.02
