"""What must hold of every recipe that `drawing` makes: `check_any` of all of them, `check_runs` of those that load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from random import Random
from typing import Any

import strategies
import torch
from fuzzing.drawing import DEPTH, broken, drawn
from fuzzing.texts import GOOD, PIECES, check, mutated

from tokenprune.budget import survivors
from tokenprune.core.attention import RaterAttention
from tokenprune.core.grids import pictures_of
from tokenprune.core.signals import Signal
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, RecipeError, TokenPruneError
from tokenprune.parts.learned import Host, Learned
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import InvalidRecipeError, Recipe, load_recipe, parse_recipe

_SAYS_WHERE = re.compile(r"[^\s:]+: |(missing required|unknown) key ")
"""A path into the data, or a key of the whole."""


def samples(rng: Random) -> list[strategies.Sample]:
    """One to three samples of different sizes, nothing dropped yet."""

    def one() -> strategies.Sample:
        grids = [tuple(rng.randint(1, most) for most in (2, 5, 5)) for _ in range(rng.randint(1, 2))]
        return strategies.sample(
            *grids,
            texts=rng.randint(1, 5),
            seed=rng.randint(0, 10_000),
            ties=rng.random() < 0.25,  # type: ignore[arg-type]
        )

    return [one() for _ in range(rng.randint(1, 3))]


# ----------------------------------------------------------------------------------------------------- what must hold


def check_any(data: Any) -> Recipe | InvalidRecipeError:
    """Loading gives a recipe that survives being written down, or an error whose problems all say where."""
    refused, recipe = None, None
    try:
        recipe = load_recipe(data)
    except InvalidRecipeError as error:
        refused = error
    if recipe is None:
        assert refused is not None and refused.problems
        assert len(str(refused).splitlines()) == len(refused.problems), "one line a problem, where there is no text"
        for problem in refused.problems:
            assert _SAYS_WHERE.match(problem.message), problem.message
        return refused
    again = parse_recipe(recipe.dump())
    assert again == recipe == load_recipe(recipe.to_dict())
    assert again.fingerprint == recipe.fingerprint
    assert again.stages == recipe.stages, "equality of recipes is of what they say: this is of what they are"
    return recipe


def a_text(rng: Random) -> str:
    """A recipe as a file has it, with a few characters changed: one of ours, or a random one."""
    if rng.random() < 0.2:
        return "".join(rng.choices(PIECES, k=rng.randint(0, 25)))
    try:
        text = load_recipe(drawn(rng)).dump()
    except InvalidRecipeError:
        text = rng.choice(GOOD)
    return mutated(rng.choice([text, rng.choice(GOOD)]), rng)


def check_text(text: str) -> Recipe | InvalidRecipeError:
    """As `check_any`, and every place lies inside the text."""
    try:
        recipe = parse_recipe(text, path="r")
    except InvalidRecipeError as error:
        check(error, {"r": text})
        return error
    again = parse_recipe(recipe.dump())
    assert again == recipe and again.stages == recipe.stages
    return recipe


def check_runs(recipe: Recipe, rng: Random) -> str:
    """It runs on plain tensors, with the counts of its plan and finite numbers; or is refused by name, and why."""
    tokens = strategies.collate(samples(rng))
    try:
        pipeline = Pipeline(
            _stages(recipe), budget=recipe.budget, depth=DEPTH, name=recipe.name, pictures=recipe.pictures
        )
        tokens = strategies.with_tower(tokens, {name for one in pipeline for name in one.reads.tower})
        plans = [pipeline.plan(total, grids) for total, grids in zip(tokens.total, tokens.grids, strict=True)]
        alone = pipeline.alone(tokens.total, tokens.grids) if pipeline.apart else ()
    except TokenPruneError as error:
        return _refused(recipe, error)
    _within_budget(recipe, pipeline, tokens, plans)
    whole, tokens = tokens.attention, with_signals(tokens, pipeline)
    for index, one in enumerate(pipeline):
        counts = [plan[index] for plan in plans]
        looked = partial(strategies.glimpse_of, tokens.signal("layer_keys").transpose(1, 2), tokens.valid)
        before = replace(tokens, attention=attention_at(tokens, whole), glimpse=looked)
        result = one(before, pictures=alone[index]) if alone else one(before, None if None in counts else tuple(counts))
        tokens = result.tokens
        tokens.check()
        assert tokens.hidden[tokens.valid].isfinite().all(), "hidden states"
        assert tokens.bias is None or tokens.bias[tokens.valid].isfinite().all(), "biases"
        for row, size in enumerate(tokens.sizes):
            own = tokens.origin[row, tokens.valid[row]].tolist()
            assert len(own) == size and own == sorted(set(own))
            assert set(own) <= set(before.origin[row].tolist())
            nothing = 0 in (plans[row][index], getattr(one.scheduler, "keep", None))  # `keep: 0` drops all that is left
            least = 0 if nothing else min(1, before.sizes[row])
            assert least <= size <= before.sizes[row]
            if None not in plans[row][: index + 1]:
                expected = survivors(pipeline.steps()[: index + 1], plans[row][: index + 1], tokens.total[row])[-1]
                if alone:
                    mine = [picture for picture in alone[index] if picture.row == row]
                    expected = sum(p.count + one.recycler.added(p.size - p.count) for p in mine)
                assert size == expected, "not as many as planned"
                assert int((result.kept[row] >= 0).sum()) == plans[row][index], "not as many survivors as planned"
    return "ran"


def with_signals(tokens: Tokens, pipeline: Pipeline) -> Tokens:
    """The same, and something for each signal that a stage reads: what a model has recorded before its place."""
    keys, earlier = (tokens.signals.recorded[name] for name in ("layer_keys", "earlier_1"))
    attention = Signal(tokens.hidden[..., 0].float().sigmoid(), tokens.valid)
    given = {"keys": keys, "class_attention": attention, "received_attention": attention}
    wanted = {name for one in pipeline for name in one.reads.signals} - set(tokens.signals.recorded) - {"embedding"}
    return replace(
        tokens, signals=tokens.signals.adding({name: given.get(name.partition("@")[0], earlier) for name in wanted})
    )


def attention_at(tokens: Tokens, whole: Any) -> RaterAttention:
    """Attention to the tokens that are left, of either layer, as the engine gives it."""
    text, length = tokens.question.valid.shape[1], int(whole.columns.shape[1]) + tokens.question.valid.shape[1]
    ones = torch.ones(1, 1, text, strategies.HEAD_WIDTH), torch.ones(1, 1, length, strategies.HEAD_WIDTH)
    return RaterAttention(
        project=lambda layer, rope, rows: whole.project("previous", rope, rows),
        columns=tokens.slot,
        columns_valid=tokens.valid,
        kernel=lambda layer: ones,
    )


def _stages(recipe: Recipe) -> list[Any]:
    stages = recipe.build_stages()
    for one in stages:
        for piece in one.parts:
            if isinstance(piece, Learned) and piece.host is None:
                piece.start(Host("", strategies.WIDTH, strategies.HEADS, 2), seed=0)
    return stages


def _within_budget(recipe: Recipe, pipeline: Pipeline, tokens: Tokens, plans: Sequence[Sequence[int | None]]) -> None:
    """A budget is an upper limit of what it names, unless no stage can leave less: one token each, or the one that a
    recycler makes of what is dropped beside it."""
    if recipe.budget is None or not len(pipeline):
        return
    prompts = list(zip(tokens.total, tokens.grids, plans, strict=True))
    if pipeline.apart:  # a budget is one of each picture
        alone = [picture for _, grids, _ in prompts for picture in pictures_of(grids)]
        sizes = [sum(map(prod, picture)) for picture in alone]
        prompts = [(size, own, pipeline.plan(size, own)) for size, own in zip(sizes, alone, strict=True)]
    for total, grids, plan in prompts:
        wanted = recipe.budget.value
        limit = min(wanted, total) if isinstance(wanted, int) else wanted * total
        got = getattr(pipeline.summary(total, grids), recipe.budget.kind)
        assert got <= limit + 1e-6 or all(k in (0, 1, None) for k in plan) or total <= 2, (
            f"{recipe.budget} of {total} tokens gives {got}: {plan}"
        )


REFUSALS = ("does not fit a model", "the model has 8 layers", "no weights some.safetensors", "pictures: apart", "flops")
"""Why a right recipe may not run on plain tensors of eight layers, beside a budget that cannot be met."""


def _refused(recipe: Recipe, error: TokenPruneError) -> str:
    if isinstance(error, BudgetError):
        return "budget cannot be met"
    assert isinstance(error, RecipeError) or (recipe.budget is not None and recipe.budget.kind == "flops"), error
    told = next((reason for reason in REFUSALS if reason in str(error)), None)
    assert told is not None, f"refused: {error}"
    return told


def one_recipe(rng: Random) -> list[str]:
    """One case of a long run: what came of it, in a few words each."""
    kind = rng.choice(["drawn", "drawn", "broken", "text"])
    outcome = check_text(a_text(rng)) if kind == "text" else check_any(drawn(rng) if kind == "drawn" else broken(rng))
    if isinstance(outcome, Recipe):
        return [f"{kind}: loaded", check_runs(outcome, rng)]
    return [f"{kind}: refused with a place"]
