"""Scenes: reproducible, held apart, and what their objects say they are."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tokenprune.scenes.generate import CELL, COLOURS, SHAPES, SIZES, TEST_SEEDS, TRAIN_SEEDS, UNITS, owners, scene
from tokenprune.scenes.grounds import GROUNDS, PHOTOGRAPHIC, texture

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
    from tokenprune.scenes.batches import training_batch

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
