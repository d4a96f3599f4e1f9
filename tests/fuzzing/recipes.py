"""Random recipes from what the parts themselves declare, right ones and broken ones, and what must hold of each.

`drawn` is a recipe as data: every role, every part that is registered, every setting within its limits. `broken` is
one with a few things replaced, left out or added, on and beside the limits. `check_any` holds for all of them,
`check_runs` for those that load.

All draw from a `random.Random`: hypothesis has one that it can shrink (`st.randoms`), and for hundred thousands there
is Python's own, which is ten times faster and names a case by its seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from math import inf, nan, nextafter
from random import Random
from typing import Any

import strategies
import torch
from fuzzing.texts import GOOD, PIECES, check, mutated

from tokenprune.budget import survivors
from tokenprune.core.attention import RaterAttention
from tokenprune.core.place import Place
from tokenprune.core.signals import Signal
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, RecipeError, TokenPruneError
from tokenprune.parts.learned import Host, Learned
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import InvalidRecipeError, Recipe, load_recipe, parse_recipe
from tokenprune.recipe.part_models import make_part, part_models
from tokenprune.registry import ROLES

DEPTH = 8
ODD = [
    *(None, True, False, 0, 1, -1, 2**31, 10**30, 0.0, 1.0, 1.5, -0.5, inf, -inf, nan),
    *("", "top_k", "1/2", "\x85", [], {}, [1], {"type": "fixed"}),
]
"""What may stand where something else belongs."""
_SAYS_WHERE = re.compile(r"[^\s:]+: |(missing required|unknown) key ")
"""A path into the data, or a key of the whole."""


# ------------------------------------------------------------------------------------------------------------ settings


def within(rng: Random, schema: dict[str, Any]) -> Any:
    """A value that a JSON Schema of a setting allows; numbers small more often than not, as tests have few tokens."""
    if "anyOf" in schema:
        return within(rng, rng.choice(schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema["type"]
    if kind == "integer":
        low, high = schema["minimum"], schema["maximum"]
        near = max(low, 0)
        return rng.choice(
            [low, high, rng.randint(low, high), *(rng.randint(near, min(high, near + 20)) for _ in "12345")]
        )
    if kind == "number":
        low, high = schema.get("minimum"), schema["maximum"]
        least = nextafter(0.0, 1.0) if low is None else float(low)
        usual = [round(rng.uniform(0.05, min(1.0, high)), 3) for _ in range(5)]
        return rng.choice([least, float(high), rng.uniform(least, high), *usual])
    if kind == "object":
        keys = {rng.randint(1, 60) for _ in range(rng.randint(1, 3))}
        return {key: min(key, within(rng, schema["additionalProperties"])) for key in keys}
    if kind == "array":  # boxes of a mask: the only setting that is one
        return [[0.0, 0.0, round(rng.uniform(0.1, 1.0), 2), round(rng.uniform(0.1, 1.0), 2)]]
    if "%|" in schema.get("pattern", ""):  # a share of the tower's depth
        return rng.choice(["25%", "1/3", "5/24"])
    return {"boolean": rng.random() < 0.5, "null": None, "string": "some.safetensors#0123456789ab"}[kind]


def beside(schema: dict[str, Any]) -> list[Any]:
    """Values on and just beyond the limits of a setting."""
    found = [value for option in schema.get("anyOf", ()) for value in beside(option)]
    for key in ("minimum", "maximum", "exclusiveMinimum"):
        if key in schema and schema["type"] == "integer":
            found += [schema[key] - 1, schema[key], schema[key] + 1, float(schema[key])]
        elif key in schema:
            limit = float(schema[key])
            found += [nextafter(limit, -inf), limit, nextafter(limit, inf)]
    return found


@cache
def settings_of(role: str, name: str) -> dict[str, dict[str, Any]]:
    """JSON Schema of every setting of a part."""
    schema = part_models(role)[name].model_json_schema()
    return {key: value for key, value in schema["properties"].items() if key != "type"}


@cache
def names_of(role: str) -> list[str]:
    return sorted(part_models(role))


def part(rng: Random, role: str) -> dict[str, Any]:
    """Any part of a role, any of its settings given."""
    name = rng.choice(names_of(role))
    made: dict[str, Any] = {"type": name}
    for key, schema in settings_of(role, name).items():
        named = key == "weights"  # of a file: one that is not there is a mistake of its own, seldom made
        if "default" not in schema or rng.random() < (0.1 if named else 0.5):
            made[key] = within(rng, schema)
    if "offset" in made:
        made["offset"] = made["offset"] % (made.get("stride") or 3)
    return made


# ------------------------------------------------------------------------------------------------------------- recipes


def _order(place: Any, depth: int) -> tuple[int, float]:
    where = Place.parse(place)
    kinds = ("in_vision", "after_vision", "before_layer")
    return kinds.index(where.kind), where.layer(depth) if where.in_decoder else float(where.at or 0)


def stage(rng: Random, place: Any, *, original: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"place": place}
    for role in ROLES:
        if role != "raters" and (role == "scheduler" or rng.random() < 0.5):
            made[role] = part(rng, role)
    if not original and rng.random() < 0.25:
        made["positions"] = rng.choice(["original", "renumber"])
    if _asks(made):
        made["raters"] = part(rng, "raters")
    return made


def _asks(made: dict[str, Any]) -> bool:
    for role in ROLES:
        try:
            if role in made and make_part(role, made[role]).build().reads.asks_raters:
                return True
        except ValueError:  # settings that contradict each other: the recipe is refused
            continue
    return False


def drawn(rng: Random, *, original: bool = False, depth: int = DEPTH, tower: bool = True) -> dict[str, Any]:
    """A recipe as data, most of the time a right one.

    Args:
        original: survivors keep their position ids.
        depth: layers of the model; with `tower`, some places lie beyond.
        tower: whether stages may stand in the vision tower.
    """

    def place() -> Any:
        layer, share = rng.randint(0, depth - 1), rng.choice([f"{rng.randint(1, depth - 1)}/{depth}", "25%", "62.5%"])
        ways: list[Any] = ["after_vision", {"before_layer": layer}, {"before_layer": layer}, {"before_layer": share}]
        return rng.choice([*ways, *([{"in_vision": {"block": rng.randint(0, 30)}}] if tower else [])])

    places = sorted((place() for _ in range(rng.randint(0, 4 if tower else 3))), key=lambda at: _order(at, depth))
    if tower and rng.random() < 0.03:
        places.append({"before_layer": rng.randint(depth, 9999)})
    made: dict[str, Any] = {"version": 1, "stages": [stage(rng, where, original=original) for where in places]}
    if rng.random() < 0.5 or any(one["scheduler"]["type"] == "solved" for one in made["stages"]):
        kind = rng.choice(["keep", "average", "final", *(["flops"] if not tower or rng.random() < 0.2 else [])])
        share = round(rng.uniform(0.1, 1.0), 3)
        made["budget"] = {kind: share if kind == "flops" else rng.choice([share, rng.randint(1, 40)])}
    return made


def broken(rng: Random) -> dict[str, Any]:
    """A recipe with one to three things put wrong, or on their limits."""
    made = drawn(rng)
    for _ in range(rng.randint(1, 3)):
        if not (holders := list(_holders(made))):
            break
        holder, key, schema = rng.choice(holders)
        act = rng.choice(["beside", "beside", "odd", "leave out", "rename", "repeat"])
        if act == "leave out":
            del holder[key]
        elif act == "rename" and isinstance(holder, dict):
            holder[rng.choice([f"{key}s", str(key)[1:], "sampler", "type", "keep"])] = holder.pop(key)
        elif act == "repeat" and isinstance(holder, list):
            holder.insert(rng.randint(0, len(holder)), deepcopy(holder[key]))
        else:
            holder[key] = deepcopy(rng.choice((beside(schema) if act == "beside" else []) or ODD))
    return made


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


def _holders(data: Any, role: str | None = None) -> Any:
    """(mapping or list, key, JSON Schema of what stands there) of everything inside."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    name = data.get("type") if isinstance(data, dict) else None
    known = settings_of(role, name) if role in ROLES and isinstance(name, str) and name in part_models(role) else {}
    for key, value in pairs:
        yield data, key, known.get(key, {})
        yield from _holders(value, key if isinstance(key, str) else None)


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
        pipeline = Pipeline(_stages(recipe), budget=recipe.budget, depth=DEPTH, name=recipe.name)
        tokens = strategies.with_tower(tokens, {name for one in pipeline for name in one.reads.tower})
        plans = [pipeline.plan(total, grids) for total, grids in zip(tokens.total, tokens.grids, strict=True)]
    except TokenPruneError as error:
        return _refused(recipe, error)
    _within_budget(recipe, pipeline, tokens, plans)
    whole, tokens = tokens.attention, _with_signals(tokens, pipeline)
    for index, one in enumerate(pipeline):
        counts = [plan[index] for plan in plans]
        before = replace(tokens, attention=_attention_at(tokens, whole))
        result = one(before, None if None in counts else tuple(counts))
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
                assert size == expected, "not as many as planned"
                assert int((result.kept[row] >= 0).sum()) == plans[row][index], "not as many survivors as planned"
    return "ran"


def _with_signals(tokens: Tokens, pipeline: Pipeline) -> Tokens:
    """The same, and something for each signal that a stage reads: what a model has recorded before its place."""
    keys, earlier = (tokens.signals.recorded[name] for name in ("layer_keys", "earlier_1"))
    attention = Signal(tokens.hidden[..., 0].float().sigmoid(), tokens.valid)
    given = {"keys": keys, "class_attention": attention, "received_attention": attention}
    wanted = {name for one in pipeline for name in one.reads.signals} - set(tokens.signals.recorded) - {"embedding"}
    return replace(
        tokens, signals=tokens.signals.adding({name: given.get(name.partition("@")[0], earlier) for name in wanted})
    )


def _attention_at(tokens: Tokens, whole: Any) -> RaterAttention:
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
                piece.start(Host("", strategies.WIDTH), seed=0)
    return stages


def _within_budget(recipe: Recipe, pipeline: Pipeline, tokens: Tokens, plans: Sequence[Sequence[int | None]]) -> None:
    """A budget is an upper limit of what it names, unless no stage can leave less: one token each, or the one that a
    recycler makes of what is dropped beside it."""
    if recipe.budget is None or not len(pipeline):
        return
    for total, grids, plan in zip(tokens.total, tokens.grids, plans, strict=True):
        wanted = recipe.budget.value
        limit = min(wanted, total) if isinstance(wanted, int) else wanted * total
        got = getattr(pipeline.summary(total, grids), recipe.budget.kind)
        assert got <= limit + 1e-6 or all(k in (0, 1, None) for k in plan) or total <= 2, (
            f"{recipe.budget} of {total} tokens gives {got}: {plan}"
        )


REFUSALS = ("does not fit a model", "the model has 8 layers", "no weights some.safetensors", "flops")
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
