"""`bench`: every side in turn, round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenprune.builder import build
from tokenprune.cost.account import Ledger, account
from tokenprune.errors import InputError
from tokenprune.families.noise import Pictures, usual_pictures
from tokenprune.families.shape import model_shape
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.bench.clock import Sample
from tokenprune.study.bench.result import Bench, SideRow
from tokenprune.study.bench.sides import SMALLER, Compile, Side, sides

LEADING = 4
"""Words of a prompt before its first picture; see `tokenprune.families.noise.noise`."""


def bench(
    model: Any,
    recipe: str | Path | Recipe,
    *,
    name: str | None = None,
    tokens: int | None = None,
    text: int = 64,
    new_tokens: int = 16,
    batches: Sequence[int] = (1,),
    rounds: int = 7,
    warmup: int = 1,
    baselines: bool = True,
    compile: Compile = False,
    on_run: Callable[[int], None] | None = None,
) -> Bench:
    """Time a recipe against the untouched model, and against what else could save as many tokens.

    All sides use the same weights, attention kernel and prompts, and run in the same process by turns: in each round
    every side once, in an order that turns from round to round, after `warmup` rounds that are thrown out. Prompts are
    noise: what is in a picture does not matter for time, except to adaptive recipes.

    Args:
        model: a transformers model of a supported family, on its device; nothing is attached to it.
        recipe: a recipe's name, path or `Recipe`.
        name: how results call the model; its own name when left out.
        tokens: vision tokens of a sample; those of one usual picture when left out.
        text: other tokens of the prompt.
        new_tokens: tokens to generate, at least 1; with 1, only the prefill runs.
        batches: batch sizes, each measured by itself.
        rounds: how often each side runs, an odd number.
        warmup: rounds before them that do not count, at least 1.
        baselines: run random, uniform and a smaller image beside.
        compile: run all sides under torch.compile, as in `attach`; `warmup` rounds pay for it.
        on_run: called with 1 behind every run, for a progress bar.

    Raises:
        InputError: a number out of range.
        RecipeError, BudgetError: the recipe is not valid, or does not fit the model.
        UnsupportedModelError: a family without an adapter, or one that `noise` makes no pictures for.
    """
    _check(text=text, new_tokens=new_tokens, batches=batches, rounds=rounds, warmup=warmup)
    loaded = load_recipe(recipe)
    pictures = usual_pictures(model.config, tokens)
    rows: list[SideRow] = []
    with sides(model, loaded, pictures, text=text, baselines=baselines, compile=compile) as running:
        for batch in batches:
            rows += measure(running, text, batch, new_tokens, rounds, warmup, on_run)
    shape = model_shape(model, name=name)
    weights = sum(weight.numel() for weight in model.parameters())
    device = next(model.parameters()).device
    return Bench(
        model=shape.name,
        recipe=loaded.name,
        budget=None if loaded.budget is None else str(loaded.budget),
        fingerprint=loaded.fingerprint,
        parameters=weights,
        tokens=pictures.tokens,
        text=text,
        new_tokens=new_tokens,
        attention=str(model.config.get_text_config()._attn_implementation),
        compiled=bool(compile),
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        rows=rows,
    )


def _check(*, text: int, new_tokens: int, batches: Sequence[int], rounds: int, warmup: int) -> None:
    if rounds < 1 or rounds % 2 == 0:
        raise InputError(f"rounds: expected an odd number, so that a median is a measured one, got {rounds}")
    for what, value in (
        ("new_tokens", new_tokens),
        ("warmup", warmup),
        ("text", text),
        *(("batch", b) for b in batches),
    ):
        if value < 1:
            raise InputError(f"{what}: expected at least 1, got {value}")
    if not batches or len(set(batches)) < len(batches):
        raise InputError(f"batches: expected different batch sizes, got {list(batches)}")


def measure(
    running: Sequence[Side],
    text: int,
    batch: int,
    new_tokens: int,
    rounds: int,
    warmup: int = 1,
    on_run: Callable[[int], None] | None = None,
) -> list[SideRow]:
    """Rows of these sides, the first of which is the untouched model; arguments as in `bench`."""
    samples: dict[str, list[Sample]] = {side.name: [] for side in running}
    prompts = {side.name: side.prompt(text=text, batch=batch) for side in running}
    for number in range(-warmup, rounds):
        turn = number % len(running)
        # Whoever runs behind a large neighbour may find other caches: every side takes every place.
        for side in [*running[turn:], *running[:turn]]:
            sample = side.run(prompts[side.name], new_tokens)
            if number >= 0:
                samples[side.name].append(sample)
            if on_run is not None:
                on_run(1)
    untouched = tuple(samples[running[0].name])
    rows = []
    for side in running:
        layers = side.tokens_per_layer()
        rows.append(
            SideRow(
                name=side.name,
                batch=batch,
                tokens=sum(layers) / len(layers),
                samples=tuple(samples[side.name]),
                untouched=untouched,
                ledger=_ledger(side, running[0].pictures, text, new_tokens),
                smaller=_ledger(side, side.pictures, text, new_tokens) if side.name == SMALLER else None,
            )
        )
    return rows


def _ledger(side: Side, pictures: Pictures, text: int, new_tokens: int) -> Ledger:
    """What the ledger says of a side; of an adaptive recipe at the counts of the last run's first sample."""
    shape = model_shape(side.model)
    if side.name == SMALLER:
        shape = replace(shape, vision=shape.vision.resized())
    pipeline = build("none" if side.recipe is None else side.recipe, depth=shape.decoder.layers)
    kept = None
    if side.attached is not None and not pipeline.static:
        kept = [int((stage.kept[0] >= 0).sum()) for stage in side.attached.report.stages]
    told = account(
        shape,
        pipeline,
        total=pictures.tokens,
        grids=pictures.grids,
        text=text,
        question=max(0, text - LEADING),
        new_tokens=new_tokens,
        kv_bytes=side.model.dtype.itemsize,
        kept=kept,
    )
    return replace(told, exact=kept is None)
