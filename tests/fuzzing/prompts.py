"""Random prompts under random pipelines on the tiny models, held to the masked reference and to each sample alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any

import torch
from families import CACHE, FAMILIES, Batch, Row, build, inputs, next_turn, row_inputs, sizes, vision_mask
from fuzzing.drawing import drawn
from pruned import TOLERANCE, logits_of, reference_stages, stage_results, worst
from reference import generate_logits, masked_reference, pruned_difference

import tokenprune as tp
from tokenprune.core.place import Place
from tokenprune.engine.weights import host_of
from tokenprune.errors import BudgetError, InputError, NotFiredError, RecipeError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import InvalidRecipeError, load_recipe

LAYERS = 4
NEW = 4
"""Tokens of an answer."""
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "dynamic cache": (1, {}),
    "static cache": (1, {"cache_implementation": "static"}),
    "no cache": (1, {"use_cache": False}),
    "beams": (2, {"num_beams": 2}),
    "chunks": (1, {"prefill_chunk_size": 0}),
    "static cache, chunks": (1, {"cache_implementation": "static", "prefill_chunk_size": 0}),
}
"""Rows that `generate` makes of each sample, and its arguments; the size of chunks is drawn."""


@cache
def model_of(family: str, attention: Any) -> Any:
    return build(family, attention=attention, layers=LAYERS)


NOT_THERE = re.compile(
    r"nothing runs before layer 0|entered a decoder layer \d+ before the place, but the place is|but \w+ has \d+ blocks"
)
"""How `attach` refuses a part that reads layers before the first, or a block that the tower has not."""


def rows_of(rng: Random, family: str, *, ends: bool) -> list[Row]:
    """One to three samples: none to three pictures, with text before, between and behind; `ends`: or none behind."""
    least = 1 if family.startswith("qwen") else 0  # Qwen's prompts need a mark at a picture, and one between two
    return [
        Row(
            before=rng.randint(1, 9) if not pictures else rng.randint(least, 9),
            images=[rng.choice(sizes(family)) for _ in range(pictures)],
            between=rng.randint(least, 6),
            after=0 if ends and rng.random() < 0.15 else rng.randint(1, 12),
        )
        for pictures in (rng.choice([0, 1, 1, 1, 2, 2, 3]) for _ in range(rng.randint(1, 3)))
    ]


def pipeline_of(rng: Random, model: Any) -> Pipeline:
    """A random recipe that loads; what it has to learn is as a fit begins."""
    while True:
        try:
            data = drawn(rng, original=True, depth=LAYERS, tower=False)
            for stage in data["stages"]:
                if Place.parse(stage["place"]).layer(LAYERS) == 0:  # no layer has run before: seldom tried, as refused
                    stage.update({role: {**part, "layer": "next"} for role, part in stage.items() if _attends(part)})
            recipe = load_recipe(data)
            stages = fresh_stages(recipe, host_of(anatomy(model)))
            return Pipeline(stages, budget=recipe.budget, depth=LAYERS, name="drawn", pictures=recipe.pictures)
        except (InvalidRecipeError, BudgetError):
            continue
        except RecipeError as error:
            if "pictures: apart" not in str(error):
                raise


def _attends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in {"attention", "rank_ratio"}


def one_prompt(rng: Random) -> list[str]:
    """One case of a long run: what was tried, and what came of it; raises where something is wrong."""
    family, attention = rng.choice(FAMILIES), rng.choice(["sdpa", "eager"])
    model = model_of(family, attention)
    way = rng.choice(["forward", "turns", "row by row", *WAYS])
    # Behind a picture that ends the prompt, the reference's answer is that of a token which is dropped.
    pipeline, rows = pipeline_of(rng, model), rows_of(rng, family, ends=way in {"forward", "row by row"})
    side = rng.choice(["left", "right"]) if way == "forward" else "left"
    batch = inputs(family, model, rows=rows, side=side, seed=rng.randint(0, 10_000))
    try:
        if way == "forward":
            check_forward(model, batch, pipeline)
        elif way == "turns":
            check_turns(model, batch, pipeline, words=rng.randint(1, 9))
        elif way == "row by row":
            check_rows(model, batch, rows, pipeline)
        else:
            check_generate(model, batch, pipeline, way, chunk=rng.randint(2, 40))
    except BudgetError:
        return [family, f"{way}: budget cannot be met"]
    except UnsupportedModelError as error:
        if way == "no cache" and "kv: all_layers hides" in str(error):
            return [family, f"{way}: kv: all_layers needs a cache"]
        if not NOT_THERE.search(str(error)):
            raise
        return [family, f"{way}: a part reads layers or blocks that are not there"]
    except InputError as error:
        if family == "llava_next" and "half a picture?" in str(error) and not all(row.between for row in rows):
            # An overview of 2 x 2 tokens and a row of tiles may look like a wider row of the picture right before; one
            # of 24 x 24, as released towers have, is longer than any row.
            return [family, f"{way}: pictures of a tiny tower cannot be told apart"]
        if not nobody_rates(rows, error):
            raise
        return [family, f"{way}: nobody can rate"]
    return [family, f"{way}: right"]


def nobody_rates(rows: list[Row], error: InputError) -> bool:
    """Whether a refusal is the one promised: raters are asked, and no text follows a picture in any sample."""
    behind = any(row.after or (len(row.images or ()) > 1 and row.between) for row in rows if row.images)
    return "no text token follows" in str(error) and not behind


class Ran:
    """What a pipeline did to a batch, for the reference."""

    stages: list[Any]
    kept: list[list[list[int]]]
    last: Any = None


@contextmanager
def attached(model: Any, batch: Batch, pipeline: Pipeline, expand: int = 1) -> Iterator[Ran]:
    ran = Ran()
    with tp.attach(model, pipeline) as on, stage_results(on) as results:
        yield ran
    try:
        reported = on.report.stages
    except NotFiredError:
        assert not any(batch.images), "pictures, and no stage ran"
        ran.stages, ran.kept = [], []
        return
    rows = slice(None, None, expand)
    ran.stages = reference_stages(on.report, results, rows)
    ran.kept = [[[i for i in row if i >= 0] for row in stage.kept[rows].tolist()] for stage in reported]
    ran.last = reported[-1].kept if reported else None


def check_forward(model: Any, batch: Batch, pipeline: Pipeline) -> None:
    with attached(model, batch, pipeline) as ran:
        logits = logits_of(model, batch)
    vision = vision_mask(model, batch["input_ids"])
    with masked_reference(model, vision, ran.stages):
        expected = logits_of(model, batch)
    if ran.last is None:
        assert torch.equal(logits, expected), "nothing was to be done"
        return
    difference = pruned_difference(logits, expected, vision, batch["attention_mask"], ran.last, ran.stages[-1].anchors)
    assert difference < TOLERANCE, f"logits differ by {difference}"


def check_generate(model: Any, batch: Batch, pipeline: Pipeline, way: str, *, chunk: int) -> None:
    expand, given = WAYS[way]
    options = {**given, "max_new_tokens": NEW}
    if "prefill_chunk_size" in options:
        options["prefill_chunk_size"] = chunk
    with attached(model, batch, pipeline, expand) as ran:
        got, logits = generate_logits(model, batch, **options)
    with masked_reference(model, vision_mask(model, batch["input_ids"]), ran.stages):
        expected, wanted = generate_logits(model, batch, **options)
    assert torch.equal(got, expected), "other tokens"
    assert worst(logits, wanted) < TOLERANCE, f"logits differ by {worst(logits, wanted)}"


def check_turns(model: Any, batch: Batch, pipeline: Pipeline, *, words: int) -> None:
    def two_turns() -> tuple[torch.Tensor, ...]:
        first = model.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        following = next_turn(batch, first.sequences, words=words)
        return generate_logits(model, {**following, CACHE: first[CACHE]}, max_new_tokens=NEW)[1]

    with attached(model, batch, pipeline) as ran:
        logits = two_turns()
    with masked_reference(model, vision_mask(model, batch["input_ids"]), ran.stages):
        expected = two_turns()
    assert worst(logits, expected) < TOLERANCE, f"logits differ by {worst(logits, expected)}"


def check_rows(model: Any, batch: Batch, rows: list[Row], pipeline: Pipeline) -> None:
    with attached(model, batch, pipeline) as ran:
        sequences, logits = generate_logits(model, batch, max_new_tokens=NEW)
    for row in range(len(rows)):
        alone = row_inputs(batch, row)
        try:
            with attached(model, alone, pipeline) as own:
                single, wanted = generate_logits(model, alone, max_new_tokens=NEW)
        except InputError as error:
            if not nobody_rates(rows[row : row + 1], error):
                raise
            continue
        if batch.images[row]:
            assert [stage[row] for stage in ran.kept] == [stage[0] for stage in own.kept], "other tokens kept"
        assert torch.equal(sequences[row, -NEW:], single[0, -NEW:]), "another answer"
        difference = worst(tuple(step[row : row + 1] for step in logits), wanted)
        assert difference < TOLERANCE, f"logits differ by {difference}"
