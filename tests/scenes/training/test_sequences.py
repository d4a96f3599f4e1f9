"""Packed questions give the logits that the stock model gives each question alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenprune.scenes.training.batches import caption_tokens, question_tokens, tally_tokens, to_pixels
from tokenprune.scenes.training.model import build_model
from tokenprune.scenes.training.sequences import (
    IGNORE,
    image_prefix,
    pack_segments,
    packed_logits,
    packed_mask,
    vision_features,
)
from tokenprune.scenes.world.generate import TEST_SEEDS, scene
from tokenprune.scenes.world.questions import PLURALS, questions
from tokenprune.scenes.world.vocabulary import BOS, IMAGE, PAD, VISION_TOKENS, token_ids

SEED = TEST_SEEDS[4]


@torch.no_grad()
def test_packed_forward_equals_stock_forward() -> None:
    model, ids = build_model(seed=1).eval(), token_ids()
    scenes = [scene(SEED, 0), scene(SEED, 1)]
    rng = np.random.default_rng(0)
    rows = [[question_tokens(q) for q in questions(s)] + [caption_tokens(s, rng), tally_tokens(s, rng)] for s in scenes]
    text = pack_segments(rows, pad=ids[PAD])
    pixels = to_pixels([s.image for s in scenes])
    vision = vision_features(model, pixels)[1]
    packed = packed_logits(model, *image_prefix(model, vision, ids[BOS]), text, start=VISION_TOKENS + 1)
    for number, row in enumerate(rows):
        for position, segment in enumerate(row, start=1):
            sequence = torch.tensor([[ids[BOS], *[ids[IMAGE]] * VISION_TOKENS, *segment.ids]])
            alone = model(input_ids=sequence, pixel_values=pixels[number : number + 1]).logits[0, VISION_TOKENS + 1 :]
            together = packed[number, text.segment[number] == position]
            assert together.shape == alone.shape
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_questions_do_not_see_each_other() -> None:
    segment = torch.tensor([[1, 1, 2, 2, 0]])
    mask = packed_mask(segment, 2)[0, 0]
    assert mask.dtype == torch.bool
    assert mask[:, :2].tolist() == [[True, False]] + [[True, True]] * 6
    assert mask[2:6, 2:6].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.any(-1).all()


def test_tallies_count() -> None:
    names = {i: word for word, i in token_ids().items()}
    for index in range(20):
        item = scene(SEED, index)
        segment = tally_tokens(item, np.random.default_rng(1))
        words = [names[i] for i in [*segment.ids, segment.labels[-1]]]
        for name, count in zip(words[1::2], words[2::2], strict=True):
            assert int(count) == sum(name in (o.colour, PLURALS[o.shape]) for o in item.objects)


@pytest.mark.parametrize("kind", ["question", "caption", "tally"])
def test_labels_are_the_next_tokens(kind: str) -> None:
    item, rng = scene(SEED, 2), np.random.default_rng(1)
    segments = {
        "question": question_tokens(questions(item)[0]),
        "caption": caption_tokens(item, rng),
        "tally": tally_tokens(item, rng),
    }
    segment = segments[kind]
    assert len(segment.ids) == len(segment.labels) == len(segment.weights)
    for place in range(len(segment.ids) - 1):
        if segment.labels[place] != IGNORE:
            assert segment.labels[place] == segment.ids[place + 1]
    weighted = [label for label, weight in zip(segment.labels, segment.weights, strict=True) if weight]
    assert weighted and IGNORE not in weighted
