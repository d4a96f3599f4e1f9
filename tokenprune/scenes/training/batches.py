"""Training batches: scenes, their labels and packed questions, reproducible from (seed, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.scenes.training.alignment import EDGES, vision_labels
from tokenprune.scenes.training.sequences import PackedText, Segment, pack_segments, question_segment
from tokenprune.scenes.world.boxes import bin_of
from tokenprune.scenes.world.generate import COLOURS, SHAPES, TRAIN_SEEDS, Scene, scene
from tokenprune.scenes.world.questions import MAX_COUNT, PLURALS, Question, questions
from tokenprune.scenes.world.vocabulary import ANSWER, EOS, PAD, UNK, token_ids

_FREQUENCY = {
    "localisation": 2,
    "relation": 2,
    "box": 2,
    "colour": 1,
    "shape": 1,
    "size": 1,
    "existence": 2,
    "counting": 2,
    "code": 2,
    "ground": 1,
}
TASK_MIX = tuple(task for task, times in _FREQUENCY.items() for _ in range(times))
UNKNOWN_SHARE = 0.06
"""Questions that get an unknown word at a random place, so that the model tolerates words outside its vocabulary."""


@dataclass(frozen=True)
class Batch:
    """`pixels [B, 3, 96, 96]` float32, `labels [B, 144, 13]`, packed text, and the questions behind it.

    `pixels` or `text` is None where a phase of training does not use it.
    """

    pixels: Tensor | None
    labels: Tensor
    text: PackedText | None
    asked: list[list[Question]]


@cache
def _ids() -> dict[str, int]:
    return token_ids()


def encode(text: str) -> list[int]:
    """Ids of words separated by blanks; for generated text the same as the tokenizer gives."""
    ids = _ids()
    return [ids[word] for word in text.split()]


def to_pixels(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Model input `[B, 3, 96, 96]` from uint8 pictures, with the image processor's normalisation."""
    stacked = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
    return (stacked.float() / 255 - 0.5) / 0.25


def _minor() -> frozenset[int]:
    """Ids of words that all answers of a task share; they hardly count in the loss."""
    ids = _ids()
    return frozenset({ids["row"], ids["column"], ids[EOS]})


def question_tokens(question: Question, rng: np.random.Generator | None = None) -> Segment:
    """Segment of a question as it is asked at inference; with `rng`, some questions get an unknown word."""
    ids = _ids()
    prompt = encode(question.question)
    if rng is not None and rng.random() < UNKNOWN_SHARE:
        prompt.insert(int(rng.integers(len(prompt) + 1)), ids[UNK])
    return question_segment([*prompt, ids[ANSWER]], [*encode(question.answer), ids[EOS]], _minor())


def caption_tokens(item: Scene, rng: np.random.Generator) -> Segment:
    """Segment that lists the objects and their attributes, both in random order, and reads the code.

    Nearly every word of it has to be looked up in the vision tokens, against one word in ten of a question: captions
    teach the decoder to look up much faster than questions do.
    """
    ids = _ids()
    tokens, weights = [ids["objects"]], []
    for number in rng.permutation(len(item.objects)):
        thing = item.objects[number]
        edge = int(rng.integers(len(EDGES)))
        bound = f"{EDGES[edge]} {bin_of(thing.box[edge])}"
        fields = [thing.colour, thing.shape, thing.size, f"row {thing.row}", f"column {thing.column}", bound]
        for place, field in enumerate(rng.permutation(len(fields))):
            words = encode(fields[field])
            tokens += words
            weights += [0.0] * (len(words) - 1) + [1.0 if place else 0.1]
    if item.plate is not None:
        tokens += [ids["code"], *(ids[letter] for letter in item.plate.code)]
        weights += [0.0] + [1.0] * len(item.plate.code)
    return Segment(tokens[:-1], tokens[1:], weights)


def tally_tokens(item: Scene, rng: np.random.Generator) -> Segment:
    """Segment that counts several colours and shapes: what a caption is to looking up, for counting.

    Absent ones are kept as often as one present one, else "0" would be nearly always right.
    """
    ids = _ids()
    counts = {name: sum(thing.colour == name for thing in item.objects) for name in COLOURS}
    counts |= {PLURALS[name]: sum(thing.shape == name for thing in item.objects) for name in SHAPES}
    names = [name for name, count in counts.items() if 0 < count <= MAX_COUNT]
    absent = [name for name, count in counts.items() if count == 0]
    names += [absent[i] for i in rng.permutation(len(absent))[:2]]
    tokens, weights = [ids["number"]], []
    for number in rng.permutation(len(names)):
        tokens += [ids[names[number]], ids[str(counts[names[number]])]]
        weights += [0.0, 1.0]
    return Segment(tokens[:-1], tokens[1:], weights)


def training_batch(
    seed: int,
    first: int,
    size: int,
    *,
    pixels: bool = True,
    count: int = len(TASK_MIX),
    captions: int = 0,
    tallies: int = 0,
) -> Batch:
    """Scenes `first` to `first + size` of training stream `seed`, with `count` questions, captions and tallies each."""
    if seed not in TRAIN_SEEDS:
        raise ValueError(f"training seed must be in {TRAIN_SEEDS}, got {seed}: other seeds are held out")
    scenes: list[Scene] = [scene(seed, index) for index in range(first, first + size)]
    rng = np.random.default_rng((seed, first, 3))
    asked = [questions(s, [TASK_MIX[i] for i in rng.permutation(len(TASK_MIX))[:count]]) for s in scenes]
    return Batch(
        pixels=to_pixels([s.image for s in scenes]) if pixels else None,
        labels=torch.from_numpy(np.stack([vision_labels(s) for s in scenes])),
        text=_pack(scenes, asked, captions, tallies, rng) if count else None,
        asked=asked,
    )


def _pack(
    scenes: list[Scene], asked: list[list[Question]], captions: int, tallies: int, rng: np.random.Generator
) -> PackedText:
    rows = [
        [question_tokens(q, rng) for q in row]
        + [caption_tokens(item, rng) for _ in range(captions)]
        + [tally_tokens(item, rng) for _ in range(tallies)]
        for item, row in zip(scenes, asked, strict=True)
    ]
    return pack_segments(rows, pad=_ids()[PAD])
