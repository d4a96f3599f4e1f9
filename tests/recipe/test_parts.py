"""Models and help made from the constructors of parts, of ours and of parts that are hard to describe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from torch import Tensor

from tokenprune import registry
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.part import Part
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.samplers.base import Sampler
from tokenprune.recipe import describe_part, load_recipe
from tokenprune.recipe.part_models import part_model
from tokenprune.recipe.text.type_text import type_text
from tokenprune.registry import ROLES, check_constructor, parts


class Fake(Sampler):
    """A sampler for tests."""

    def forward(self, tokens: Tokens, scores: Tensor, count: Count, groups: Tensor | None = None) -> Tensor:
        return scores


class ManySampler(Fake):
    """Has a setting of every type.

    More about it.

    Args:
        whole: a number
            on two lines: here.
        real (float): a real number.
        shape: sizes.
        drop: called like the tag of another part.

    Raises:
        whole: never.
    """

    def __init__(
        self,
        *,
        whole: int,
        real: Annotated[float, Field(gt=0, lt=10)] = 1.0,
        shape: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2),
        names: frozenset[str] = frozenset(),
        mode: Literal["fast", "slow"] | None = None,
        drop: bool = False,
        many: str = "x",
    ) -> None:
        super().__init__()
        self.whole, self.real, self.shape, self.names = whole, real, shape, names
        self.mode, self.drop, self.many = mode, drop, many
        if whole == 13:
            raise InputError("sampler 'many': thirteen brings bad luck")


@pytest.fixture
def many() -> Iterator[None]:
    """A registry with the sampler ``many`` in it."""
    tried = registry._TRIED.set({("sampler", "many"): ManySampler})
    yield
    registry._TRIED.reset(tried)


def recipe(**settings: object) -> dict[str, Any]:
    stage = {"place": "after_vision", "sampler": {"type": "many", **settings}}
    return {"version": 1, "budget": {"keep": 3}, "stages": [stage]}


@pytest.mark.usefixtures("many")
def test_every_type_is_read_strictly_and_survives_a_round_trip() -> None:
    loaded = load_recipe(recipe(whole=3, real=2, shape=[4, 5], names=["a"], mode="fast", drop=True, many="many"))
    part = loaded.build_stages()[0].sampler
    assert isinstance(part, ManySampler)
    assert part.settings() == {
        "whole": 3, "real": 2.0, "shape": (4, 5), "names": frozenset("a"), "mode": "fast", "drop": True, "many": "many",
    }  # fmt: skip
    assert load_recipe(loaded.to_dict()) == loaded


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"whole": 2.0}, "whole: should be a whole number from -2147483647 to 2147483647 (got 2.0)"),
        ({"whole": True}, "whole: should be a whole number from -2147483647 to 2147483647 (got true)"),
        ({"whole": "2"}, "whole: should be a whole number from -2147483647 to 2147483647 (got '2')"),
        ({"whole": 2**40}, "whole: should be a whole number from -2147483647 to 2147483647 (got 1099511627776)"),
        ({"whole": 3, "real": 10}, "real: should be a number in (0, 10) (got 10)"),
        ({"whole": 3, "real": False}, "real: should be a number in (0, 10) (got false)"),
        ({"whole": 3, "shape": [1, 0]}, "shape.1: should be a whole number of at least 1 (got 0)"),
        ({"whole": 3, "shape": 1}, "shape: should be a list of whole numbers of at least 1 (got 1)"),
        ({"whole": 3, "mode": "fats"}, "mode: should be fast or slow, or null (got 'fats') (did you mean 'fast'?)"),
        ({"whole": 3, "drop": "no"}, "drop: should be true or false (got 'no')"),
        ({"whole": 3, "many": 1}, "many: should be text (got 1)"),
        ({"whole": 13}, "thirteen brings bad luck"),
    ],
)
def test_settings_that_are_refused(setting: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(**setting))
    separator = ": " if expected.startswith("thirteen") else "."
    assert [p.message for p in caught.value.problems] == [f"stages.0.sampler{separator}{expected}"]


def constructor(init: Any) -> type[Part]:
    return type("OddSampler", (Fake,), {"__init__": init})


def with_type(self: Any, *, type: int = 0) -> None: ...
def with_copy(self: Any, *, copy: int = 0) -> None: ...
def with_model_name(self: Any, *, model_config: int = 0) -> None: ...
def with_any(self: Any, *, x: Any = 0) -> None: ...
def with_underscore(self: Any, *, _x: int = 0) -> None: ...


@pytest.mark.parametrize("init", [with_type, with_copy, with_model_name, with_any, with_underscore])
def test_constructors_that_no_recipe_can_describe(init: Any) -> None:
    with pytest.raises(RecipeError, match=r"OddSampler: argument '\w+' (has a name|must have a type)"):
        part_model(constructor(init), "odd")


def with_args(self: Any, *args: int) -> None: ...
def with_kwargs(self: Any, **kwargs: int) -> None: ...
def with_wrong_default(self: Any, *, x: Annotated[int, Field(ge=1)] = 0) -> None: ...
def without_type(self: Any, *, x=0) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("init", [with_args, with_kwargs, with_wrong_default, without_type])
def test_constructors_that_the_registry_refuses(init: Any) -> None:
    with pytest.raises(RecipeError):
        check_constructor(constructor(init), "here")


def test_help() -> None:
    described = describe_part(ManySampler)
    assert (described.name, described.role, described.summary) == ("many", "sampler", "Has a setting of every type.")
    rows = {argument.name: (argument.type, argument.default, argument.help) for argument in described.args}
    assert rows["whole"] == ("a whole number", None, "a number on two lines: here.")
    assert rows["real"] == ("a number in (0, 10)", "1.0", "a real number.")
    assert rows["mode"] == ("fast or slow, or null", "null", "")
    assert rows["drop"] == ("true or false", "false", "called like the tag of another part.")


@pytest.mark.parametrize("part", [part for role in ROLES for part in parts(role).values()])
def test_every_part_explains_itself(part: type[Part]) -> None:
    described = describe_part(part)
    assert described.summary.endswith((".", ":", ")"))
    for argument in described.args:
        assert argument.type
        assert argument.help, f"{part.__name__}: say in the docstring what {argument.name!r} does"


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Annotated[int, Field(le=3)], "a whole number of at most 3"),
        (Annotated[float, Field(gt=1)], "a number above 1"),
        (Annotated[float, Field(ge=0, lt=1)], "a number in [0, 1)"),
        (Annotated[int, Field(lt=3)], "a whole number below 3"),
        (Literal["a", "b", "c"], "a, b or c"),
        (list[dict[str, bool]], "a list of mappings, each key text, each value true or false"),
        (Recycler, "Recycler"),
    ],
)
def test_types_in_words(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text
