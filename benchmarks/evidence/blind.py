"""Blind tests and an oracle: how much of an answer comes from where.

grey            the picture is an empty grey one
text only       vision tokens are hidden from attention
shuffled ids    vision tokens have each other's position ids
chosen.K        only what `attention` keeps before layer K enters the model: nothing can have passed into the text
oracle.K        the tokens of the target and random others are kept before layer K (localisation)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grid
import numpy as np
import torch
from targets import target
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from tokenprune.budget import Budget
from tokenprune.core import ops
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.engine.attach import attach
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import SolvedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.pipeline import Pipeline
from tokenprune.scenes.answering import prompt
from tokenprune.scenes.cases import scene_cases
from tokenprune.scenes.training.positions import position_table, read_positions
from tokenprune.scenes.world.generate import UNITS
from tokenprune.scenes.world.vocabulary import GRID, VISION_TOKENS
from tokenprune.stage import Stage
from tokenprune.study.evaluate import Case, accuracy

BATCH = 32
SEED = 0
Around = Callable[[PreTrainedModel, Sequence[Case], dict[str, Any]], AbstractContextManager[None]]
"""What happens around the `generate` of one batch: from model, cases and inputs, which it may change."""


class GivenScorer(Scorer):
    """Scores `[B, total]` by original index, from outside."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return self.given.gather(1, tokens.origin.clamp(min=0)).masked_fill(~tokens.valid, -torch.inf)


def best_of(given: Tensor, layer: int) -> Pipeline:
    """The tokens with the highest scores `given`, before `layer`; as many as the rules look at."""
    stage = Stage(
        place=Place("before_layer", layer),
        scorer=GivenScorer(given),
        scheduler=SolvedScheduler(),
        sampler=TopKSampler(),
        recycler=DropRecycler(),
    )
    return Pipeline([stage], budget=Budget("keep", grid.MAIN_COUNT))


@contextmanager
def grey(model: PreTrainedModel, cases: Sequence[Case], inputs: dict[str, Any]) -> Iterator[None]:
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    yield


@contextmanager
def text_only(model: PreTrainedModel, cases: Sequence[Case], inputs: dict[str, Any]) -> Iterator[None]:
    vision = inputs["input_ids"] == model.config.image_token_index
    inputs["attention_mask"] = inputs["attention_mask"] * ~vision
    yield


@contextmanager
def shuffled(model: PreTrainedModel, cases: Sequence[Case], inputs: dict[str, Any]) -> Iterator[None]:
    table = position_table("raster", model.config.text_config.max_position_embeddings)
    table[1 : VISION_TOKENS + 1] = 1 + torch.randperm(VISION_TOKENS, generator=torch.Generator().manual_seed(SEED))
    handle = read_positions(model, table)
    try:
        yield
    finally:
        handle.remove()


def chosen(layer: int) -> Around:
    """What `attention` keeps before `layer` is all that enters layer 0."""

    @contextmanager
    def around(model: PreTrainedModel, cases: Sequence[Case], inputs: dict[str, Any]) -> Iterator[None]:
        with attach(model, grid.one_stage("attention", layer, grid.MAIN_COUNT)) as attached:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        kept = ops.mask_of(attached.report.stages[0].kept, VISION_TOKENS)
        with attach(model, best_of(kept.float(), 0)):
            yield

    return around


def oracle(layer: int) -> Around:
    """The target's tokens, and random ones."""

    @contextmanager
    def around(model: PreTrainedModel, cases: Sequence[Case], inputs: dict[str, Any]) -> Iterator[None]:
        index = torch.arange(VISION_TOKENS)
        row, column = index // GRID, index % GRID
        left, top, right, bottom = (torch.tensor([target(case) for case in cases]) * GRID / UNITS).T[..., None]
        inside = (column + 1 > left) & (column < right) & (row + 1 > top) & (row < bottom)
        with attach(model, best_of(inside + ops.hashed(index, SEED), layer)):
            yield

    return around


TESTS: dict[str, Around] = {
    "grey": grey,
    "text only": text_only,
    "shuffled ids": shuffled,
    **{f"chosen.{layer}": chosen(layer) for layer in grid.EARLY},
}
ORACLES: dict[str, Around] = {f"oracle.{layer}": oracle(layer) for layer in grid.LAYERS}


def ask(model: PreTrainedModel, processor: ProcessorMixin, cases: Sequence[Case], around: Around) -> list[bool]:
    """Whether each of `cases` is answered right, greedily."""
    right: list[bool] = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        texts = [prompt(processor, case.question) for case in batch]
        pictures = [case.picture() for case in batch]
        inputs = dict(processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt"))
        with around(model, batch, inputs):
            ids = model.generate(**inputs, do_sample=False)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [case.right(answer) for case, answer in zip(batch, answers, strict=True)]
    return right


def run(model: PreTrainedModel, processor: ProcessorMixin, done: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Accuracy with its interval, by test and task; `done` is called after each test."""
    found: dict[str, dict[str, Any]] = {}
    for tests, tasks in ((TESTS, grid.GRID_TASKS), (ORACLES, ("localisation",))):
        cases = scene_cases(grid.SCENES, tasks=tasks)
        for name, around in tests.items():
            right = np.array(ask(model, processor, cases, around), np.float64)
            found[name] = {}
            for task in tasks:
                of = np.array([case.task == task for case in cases])
                pictures = [case.picture_id for case in cases if case.task == task]
                found[name][task] = accuracy(right[of], pictures)._asdict()
            done()
    return found
