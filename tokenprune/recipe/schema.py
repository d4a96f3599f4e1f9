"""`Recipe` and `StageSpec`: what a recipe holds, the fields of its own kinds, and the rules between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    PlainValidator,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from tokenprune.apart import Pictures
from tokenprune.budget import Budget, BudgetKind
from tokenprune.core.needs import cannot_give
from tokenprune.core.place import Place, PlaceError, place_schema
from tokenprune.errors import RecipeError
from tokenprune.parts.learned import Learned
from tokenprune.parts.limits import Keep, Share
from tokenprune.parts.request import RequestHead
from tokenprune.recipe.again import Again
from tokenprune.recipe.overrides import DEFAULT_PARTS
from tokenprune.recipe.part_models import PartOf, PartSpec, Spec, make_part, refuse
from tokenprune.recipe.text.node import got
from tokenprune.recipe.text.type_text import type_text
from tokenprune.recipe.text.yaml_rules import write_yaml
from tokenprune.recipe.weights import find_weights
from tokenprune.registry import ROLES
from tokenprune.stage import Dropped, Kv, Positions, Stage, cannot_skip

VERSION = 1
"""The version of the format, which every recipe states."""


def _version(value: int) -> int:
    if value != VERSION:
        refuse(((), f"should be {VERSION}: this tokenprune reads no other version (got {value})"))
    return value


Version = Annotated[int, AfterValidator(_version), Field(json_schema_extra={"const": VERSION})]
RecipeName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80),
    "a name of letters, digits and . _ + -, at most 80 of them",
]
StageName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=80),
    "a name of letters, digits, _ and -, a letter first, at most 80 of them",
]


def _default(role: str) -> Any:
    return Field(default_factory=partial(make_part, role, DEFAULT_PARTS[role]))


Overrides = Annotated[dict[str, JsonValue], "a mapping of overrides such as {stages.0.scheduler.keep: 300}"]


BUDGETS: tuple[str, ...] = get_args(BudgetKind)

_KEEPS: dict[str, Any] = {kind: Share if kind == "flops" else Keep for kind in BUDGETS}
_keeps: dict[str, TypeAdapter[int | float]] = {
    kind: TypeAdapter(keep, config={"strict": True, "allow_inf_nan": False}) for kind, keep in _KEEPS.items()
}


def _place(value: Any) -> Place:
    try:
        return Place.parse(value)
    except PlaceError as error:
        if error.unknown:
            at = value[error.path[0]] if error.path else value
            _refuse_unknown(at, tuple(key for key in at if key not in error.unknown), error.path)
        inner = value
        for key in error.path:
            inner = inner[key]
        refuse((error.path, error.template.replace("{got}", got(inner))))


def _budget(value: Any) -> Budget:
    if isinstance(value, Budget):
        return value
    expected = f"exactly one of {', '.join(BUDGETS)}"
    if not isinstance(value, dict):
        refuse(((), f"should be a mapping with {expected} (got {got(value)})"))
    _refuse_unknown(value, BUDGETS)
    if len(value) != 1:
        refuse(((*list(value)[1:2],), f"should have {expected} (got {', '.join(value) or 'none'})"))
    ((kind, keep),) = value.items()
    try:
        value = _keeps[kind].validate_python(keep)
    except ValidationError:
        refuse(((kind,), f"should be {type_text(_KEEPS[kind])} (got {got(keep)})"))
    return Budget(cast("BudgetKind", kind), value)


def _refuse_unknown(value: dict[str, Any], known: tuple[str, ...], above: tuple[str, ...] = ()) -> None:
    """Raise for every key that is not known; the place of an unknown key is that of the key, below the keys `above`."""
    if unknown := [key for key in value if key not in known]:
        raise ValidationError.from_exception_data(
            "recipe", [{"type": "extra_forbidden", "loc": (*above, key), "input": value[key]} for key in unknown]
        )


PlaceField = Annotated[Place, PlainValidator(_place), WithJsonSchema(place_schema())]

BudgetField = Annotated[
    Budget,
    PlainValidator(_budget),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                kind: {"description": text, **TypeAdapter(_KEEPS[kind]).json_schema()}
                for kind, text in {
                    "keep": "Average over the layers from the first place on; with one stage, exactly the survivors",
                    "average": "Average over all layers of the tokens that enter them",
                    "final": "Tokens after the last stage",
                    "flops": "Share of the multiply-adds of the untouched prefill, from the pixels to the first token, "
                    "the recipe's own included",
                }.items()
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        }
    ),
]


class StageSpec(Spec):
    """One stage of a recipe."""

    name: StageName = Field(default="stage", description="What --set, reports and messages call it; unique")
    place: PlaceField
    raters: Annotated[PartSpec, PartOf("raters")] | None = Field(
        default=None, description="Which text tokens have a say; only with a scorer or a scheduler that asks them"
    )
    scorer: Annotated[PartSpec, PartOf("scorer")] = _default("scorer")
    scheduler: Annotated[PartSpec, PartOf("scheduler")] = _default("scheduler")
    grouper: Annotated[PartSpec, PartOf("grouper")] | None = Field(
        default=None, description="How the count is shared out over the picture or video; none makes one group"
    )
    sampler: Annotated[PartSpec, PartOf("sampler")] = _default("sampler")
    recycler: Annotated[PartSpec, PartOf("recycler")] = _default("recycler")
    rectifier: Annotated[PartSpec, PartOf("rectifier")] | None = Field(
        default=None, description="What is added to later attention to the survivors; none adds nothing"
    )
    positions: Positions = Field(default="original", description="Position ids of the survivors")
    kv: Kv = Field(
        default="later_layers",
        description="Which caches lose what is dropped: of later layers, or of all once the prefill is over",
    )
    dropped: Dropped = Field(
        default="leave",
        description="What becomes of dropped tokens: they leave the sequence; or they skip the feed-forward, seen by "
        "vision tokens and hidden from text",
    )

    @property
    def parts(self) -> dict[str, PartSpec]:
        """Role to part, of those that the stage has."""
        return {role: part for role in ROLES if (part := getattr(self, role)) is not None}

    def build(self, folder: Path | None = None) -> Stage:
        """The stage itself, with new parts; weights that it names lie in `folder`, or come with the package."""
        parts: dict[str, Any] = {role: part.build() for role, part in self.parts.items()}
        for part in parts.values():
            if isinstance(part, Learned) and part.weights is not None:
                part.read(find_weights(part.weights, folder, part.title))
        settings: dict[str, Any] = {"positions": self.positions, "kv": self.kv, "dropped": self.dropped}
        return Stage(name=self.name, place=self.place, **settings, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with defaults filled in."""
        parts = {role: part.to_dict() for role, part in self.parts.items()}
        # Left out where nobody asks for it, so that recipes from before there was a choice keep their fingerprints.
        asked: dict[str, Any] = {} if self.kv == "later_layers" else {"kv": self.kv}
        if self.dropped != "leave":
            asked["dropped"] = self.dropped
        return {"name": self.name, "place": self.place.to_plain(), **parts, "positions": self.positions, **asked}

    @model_validator(mode="after")
    def _parts_fit(self) -> StageSpec:
        reads = {role: part.build().reads for role, part in self.parts.items()}
        asking = [role for role in reads if reads[role].asks_raters]
        if asking and self.raters is None:
            names = " and ".join(f"{role} {getattr(self, role).type!r}" for role in asking)
            refuse(((asking[0],), f"needs raters ({names}): add for example `raters: last_text` to the stage"))
        if self.raters is not None and not asking:
            names = f"scorer {self.scorer.type!r} and scheduler {self.scheduler.type!r}"
            refuse((("raters",), f"without effect, as {names} ask no raters: leave them out"))
        if self.kv == "all_layers" and not self.place.in_decoder:
            refuse((("kv",), f"'all_layers' is without effect: no layer comes before {self.place}; leave it out"))
        if self.dropped == "skip_ffn" and (
            told := cannot_skip(self.place, self.positions, rectifies=self.rectifier is not None)
        ):
            refuse((("dropped",), f"'skip_ffn' does not work here: {told}"))
        for role, wanted in reads.items():
            if missing := cannot_give(self.place, wanted):
                refuse(
                    ((role,), f"{getattr(self, role).type!r} reads what is not to be had at {self.place}: {missing}")
                )
        return self


class Recipe(Spec):
    """How a model's vision tokens are reduced: stages in order, and what they may cost together.

    Made by `load_recipe`, which tells where in a file or a dict something is wrong. Two recipes are equal when all that
    they say is equal, and share a `fingerprint` when they do the same.
    """

    _folder: Path | None = PrivateAttr(default=None)

    version: Version
    name: RecipeName = "recipe"
    summary: str = Field(default="", description="One line: what it does and when to use it")
    paper: str | None = Field(default=None, description="Where the method comes from, such as arXiv:2410.04417")
    differences: tuple[str, ...] = Field(default=(), description="How it differs from the paper or its released code")
    budget: BudgetField | None = Field(
        default=None, description="Fixes all counts; the schedulers then only say how the stages share them"
    )
    pictures: Pictures = Field(
        default="together",
        description="Whether the pictures of a prompt compete for one count, or each is reduced as if it were alone "
        "(apart), as engines do that encode one at a time",
    )
    again: Again | None = Field(
        default=None, description="Ask cheaply first, and again with everything where that is not sure"
    )
    stages: tuple[StageSpec, ...] = Field(
        default=(), description="In the order in which they act; none keeps everything"
    )
    variants: dict[str, Overrides] = Field(
        default_factory=dict,
        description="Named sets of overrides, dotted path to value: `stages.0.scheduler.keep: 300`",
    )

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits for what the recipe does: version, budget, and the stages with defaults filled in.

        Names, prose and variants do not count. A part that gets a new setting changes the fingerprints of the recipes
        that use it: results from before and after are then not taken for the same.
        """
        stages = [{key: value for key, value in stage.to_dict().items() if key != "name"} for stage in self.stages]
        data = {"version": self.version, "budget": self.to_dict().get("budget"), "stages": stages}
        if self.again is not None:
            data["again"] = self.again.to_dict()
        if self.pictures != "together":
            data["pictures"] = self.pictures
        return hashlib.sha256(_canonical(data).encode()).hexdigest()[:12]

    def build_stages(self) -> list[Stage]:
        """The stages themselves, with new parts, and the weights that they name.

        Raises:
            RecipeError: weights that are not there, or are not those that the recipe means; or stages of a first pass,
                which are not all that the recipe does.
        """
        if self.again is not None:
            raise RecipeError(
                f"{self.name} asks again where a first pass is not sure (`again`): that takes whole questions, so only "
                "`tp.ask` and `tokenprune run` of one prompt can; `recipe.first_pass` has its stages alone"
            )
        return [stage.build(self._folder) for stage in self.stages]

    @property
    def first_pass(self) -> Recipe:
        """What the first pass runs: the same stages, and nothing that asks again."""
        return self.model_copy(update={"again": None})

    def build_request(self) -> RequestHead | None:
        """The learned request of `again`, with its weights; None where the recipe names none.

        Raises:
            RecipeError: weights that are not there, or are not those that the recipe means.
        """
        if self.again is None or self.again.weights is None:
            return None
        head = RequestHead()
        return head.read(find_weights(self.again.weights, self._folder, head.title))

    def in_folder(self, folder: Path | None) -> Recipe:
        """The same recipe, with its weights looked for in `folder`."""
        self._folder = folder
        return self

    @property
    def folder(self) -> Path | None:
        """Where the weights lie that it names; None for a recipe that is in no file."""
        return self._folder

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with defaults filled in and without what is empty; `load_recipe` makes an equal recipe of it."""
        data: dict[str, Any] = {
            "version": self.version,
            "name": self.name,
            "summary": self.summary,
            "paper": self.paper,
            "differences": list(self.differences),
            "budget": None if self.budget is None else {self.budget.kind: self.budget.value},
            "pictures": None if self.pictures == "together" else self.pictures,
            "again": None if self.again is None else self.again.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "variants": {name: dict(values) for name, values in self.variants.items()},
        }
        return {key: value for key, value in data.items() if value not in (None, "", [], {}) or key == "stages"}

    def dump(self) -> str:
        """YAML that loads as an equal recipe."""
        data = self.to_dict()
        for stage in data["stages"]:  # as people write it: parts without settings by their name
            for key, value in stage.items():
                if isinstance(value, dict) and value.keys() == {"type"}:
                    stage[key] = value["type"]
        return write_yaml(data)

    def __eq__(self, other: object) -> bool:
        # Not field by field: to Python, 1 token equals a share of 1.0.
        return isinstance(other, Recipe) and _canonical(self.to_dict()) == _canonical(other.to_dict())

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        wrong = [*self._names_twice(), *self._backwards(), *self._behind_skipping()]
        if self.budget is None:
            message = (
                "'solved' needs a budget: add for example `budget: {keep: 0.33}` to the recipe, or give --keep 0.33"
            )
            for index, stage in enumerate(self.stages):
                if stage.scheduler.type == "solved":
                    wrong.append((("stages", index, "scheduler"), message))
        if wrong:
            refuse(*wrong)
        return self

    def _names_twice(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("stages", index, "name"), f"{name!r} is the name of stages.{names.index(name)} already"

    def _behind_skipping(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for index, stage in enumerate(self.stages):
            if stage.dropped == "skip_ffn" and self.pictures == "apart":
                told = "'skip_ffn': pictures are taken together there; leave out pictures: apart"
                yield ("stages", index, "dropped"), told
        for index, stage in enumerate(self.stages[:-1]):
            if stage.dropped == "skip_ffn":
                later = self.stages[index + 1]
                yield (
                    ("stages", index, "dropped"),
                    f"'skip_ffn': dropped tokens stay, so no stage may follow, and {later.name!r} does; put it last",
                )

    def _backwards(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for index, stage in enumerate(self.stages):
            for before in self.stages[:index]:
                if stage.place.precedes(before.place):
                    order = f"{stage.place} comes before {before.place}, where {before.name!r} acts"
                    yield ("stages", index, "place"), f"{order}: put the stages in order"
                    break


def _canonical(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
