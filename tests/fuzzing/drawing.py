"""Random recipes from what the parts themselves declare, right ones and broken ones.

`drawn` is a recipe as data: every role, every part that is registered, every setting within its limits. `broken` is
one with a few things replaced, left out or added, on and beside the limits.

All draw from a `random.Random`: hypothesis has one that it can shrink (`st.randoms`), and for hundred thousands there
is Python's own, which is ten times faster and names a case by its seed.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from math import inf, nan, nextafter
from random import Random
from typing import Any

from tokenprune.core.place import Place
from tokenprune.recipe.part_models import make_part, part_models
from tokenprune.registry import ROLES

DEPTH = 8
ODD = [
    *(None, True, False, 0, 1, -1, 2**31, 10**30, 0.0, 1.0, 1.5, -0.5, inf, -inf, nan),
    *("", "top_k", "1/2", "\x85", [], {}, [1], {"type": "fixed"}),
]
"""What may stand where something else belongs."""


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
    if rng.random() < 0.2 and (place != "after_vision" or rng.random() < 0.1):  # refused where no layer comes before
        made["kv"] = rng.choice(["all_layers", "all_layers", "later_layers"])
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

    apart = rng.random() < 0.15  # each picture as if it were alone: behind the tower, and with counts known by shapes
    many = rng.randint(0, 4 if tower else 3)
    places = sorted(("after_vision" if apart else place() for _ in range(many)), key=lambda at: _order(at, depth))
    if tower and rng.random() < 0.03:
        places.append({"before_layer": rng.randint(depth, 9999)})
    made: dict[str, Any] = {"version": 1, "stages": [stage(rng, where, original=original) for where in places]}
    if rng.random() < 0.5 or any(one["scheduler"]["type"] == "solved" for one in made["stages"]):
        kind = rng.choice(["keep", "average", "final", *(["flops"] if not tower or rng.random() < 0.2 else [])])
        share = round(rng.uniform(0.1, 1.0), 3)
        made["budget"] = {kind: share if kind == "flops" else rng.choice([share, rng.randint(1, 40)])}
    if apart or rng.random() < 0.02:
        made["pictures"] = rng.choice(["apart", "apart", "apart", "together"])
        for one in made["stages"] if rng.random() < 0.8 else ():
            one.pop("rectifier", None)  # refused
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


def _holders(data: Any, role: str | None = None) -> Any:
    """(mapping or list, key, JSON Schema of what stands there) of everything inside."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    name = data.get("type") if isinstance(data, dict) else None
    known = settings_of(role, name) if role in ROLES and isinstance(name, str) and name in part_models(role) else {}
    for key, value in pairs:
        yield data, key, known.get(key, {})
        yield from _holders(value, key if isinstance(key, str) else None)
