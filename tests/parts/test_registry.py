"""The registry: what recipes can name, and what third parties may add."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

from tokenprune import registry
from tokenprune.errors import PluginWarning, RecipeError
from tokenprune.parts.part import Part
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.parts.scorers.base import Scorer


class MineScorer(Scorer):
    """A third party's."""

    def __init__(self, *, power: Annotated[float, Field(gt=0)] = 2.0, mode: Literal["a", "b"]) -> None:
        super().__init__()
        self.power, self.mode = power, mode

    def forward(self, tokens, raters=None):
        return torch.zeros(1)


class AttentionAgain(MineScorer):
    @classmethod
    def name(cls):
        return "attention"


class AnythingScorer(MineScorer):
    def __init__(self, **anything: int) -> None:
        super().__init__(mode="a")


class PositionalScorer(MineScorer):
    def __init__(self, power: float = 1.0) -> None:
        super().__init__(mode="a")


class UntypedScorer(MineScorer):
    def __init__(self, *, power=1.0) -> None:
        super().__init__(mode="a")


class OutOfRangeScorer(MineScorer):
    def __init__(self, *, power: Annotated[float, Field(gt=0)] = -1.0) -> None:
        super().__init__(mode="a")


class UnfinishedScorer(Scorer):
    pass


@pytest.fixture
def install(monkeypatch):
    """Pretend that a package declares an entry point for a class of this file."""

    def declare(name: str, value: str) -> None:
        loaded = globals().get(value)
        entry = EntryPoint(name=name, value=f"theirs:{value}", group=registry.GROUP)
        if loaded is not None:
            monkeypatch.setattr(EntryPoint, "load", lambda self: loaded)
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])
        forget()

    def forget() -> None:
        for kept in (registry._declared, registry._loaded, registry._warn_once):
            kept.cache_clear()

    yield declare
    monkeypatch.undo()
    forget()


def test_every_role_has_its_parts():
    assert registry.ROLES == ("raters", "scorer", "scheduler", "grouper", "sampler", "recycler", "rectifier")
    first = {
        "raters": ["above_mean", "all_text", "last_text"],
        "scorer": ["attention", "constant", "density_peaks", "norm", "random", "raster"],
        "scheduler": ["fixed", "lattice", "pyramid", "rank_ratio", "solved", "table"],
        "grouper": ["frame", "image", "segment", "tile", "window"],
        "sampler": ["random", "top_k", "uniform", "union"],
        "recycler": ["cluster", "drop"],
        "rectifier": ["log_mass"],
    }
    for role in registry.ROLES:
        names = list(registry.parts(role))
        assert set(first[role]) <= set(names)
        assert names == sorted(names) or role == "raters"
    assert registry.get("scorer", "attention") is AttentionScorer
    assert all(part.role == role for role in registry.ROLES for part in registry.parts(role).values())


def test_every_setting_is_documented_and_bounded():
    """The help text of recipes comes from the Args section; whole numbers have an upper bound."""
    from tokenprune.parts.part import settings_model

    for role in registry.ROLES:
        for part in registry.parts(role).values():
            assert part.__doc__, part
            for name, schema in settings_model(part).model_json_schema().get("properties", {}).items():
                assert f"\n        {name}: " in part.__doc__, (part, name)
                for side in schema.get("anyOf", [schema]):
                    if side.get("type") in {"integer", "number"}:
                        assert "maximum" in side, (part, name)


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        (
            "scorer",
            "attenton",
            r"unknown scorer 'attenton' \(did you mean 'attention'\?\); expected one of: \w+, ",
        ),
        ("recycler", "zzz", r"unknown recycler 'zzz'; expected one of: .*\bcluster, convolution, drop"),
        ("scheduller", "fixed", r"unknown role 'scheduller' \(did you mean 'scheduler'\?\)"),
    ],
)
def test_unknown_names_get_the_nearest(role, name, message):
    with pytest.raises(RecipeError, match=message):
        registry.get(role, name)


def test_a_third_partys_part_is_found_where_it_belongs(install):
    install("scorer.mine", "MineScorer")
    assert registry.get("scorer", "mine") is MineScorer
    assert "mine" not in registry.parts("sampler")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "scorer.attention",
            "AttentionAgain",
            "there is a scorer 'attention' already, tokenprune.parts.scorers.attention.Att",
        ),
        ("scorer.anything", "AnythingScorer", "argument 'anything' must be keyword-only"),
        ("scorer.positional", "PositionalScorer", "argument 'power' must be keyword-only"),
        ("scorer.untyped", "UntypedScorer", "argument 'power' must have a type annotation"),
        ("scorer.out_of_range", "OutOfRangeScorer", "default power=-1.0: Input should be greater than 0"),
        ("scorer.unfinished", "UnfinishedScorer", "expected a concrete subclass of tokenprune's Part"),
        ("scorer.other", "MineScorer", "expected the entry point's name to be 'scorer.mine'"),
        ("sampler.mine", "MineScorer", "its role is 'scorer', expected 'sampler'"),
        (
            "scorer.missing",
            "Missing",
            r"plug-in 'theirs' \(scorer.missing\) cannot be loaded: ModuleNotFound",
        ),
    ],
)
def test_parts_that_recipes_could_not_use_are_refused(install, name, value, message):
    """Where they are named; where parts are listed they are left out, and one warning says so."""
    install(name, value)
    role, _, kind = name.partition(".")
    with pytest.warns(PluginWarning, match=message) as warned:
        listed = {each: registry.parts(each) for each in (*registry.ROLES, role)}
    assert len(warned) == 1
    ours = "attention" if kind == "attention" else "norm"
    assert {"attention", "norm"} <= set(listed["scorer"])
    assert all(part.__module__.startswith("tokenprune.parts.") for part in listed[role].values())
    assert registry.get("scorer", ours).__module__.startswith("tokenprune.parts.")
    if kind != "attention":
        with pytest.raises(RecipeError, match=message):
            registry.get(role, kind)


def test_two_packages_with_a_part_of_one_name_harm_only_who_names_it(install, monkeypatch):
    install("scorer.mine", "MineScorer")
    twice = [EntryPoint("scorer.mine", f"{owner}:MineScorer", registry.GROUP) for owner in ("theirs", "others")]
    monkeypatch.setattr(registry, "_declared", lambda: tuple(twice))
    with pytest.raises(RecipeError, match="two packages bring a scorer 'mine': 'theirs:MineScorer' and 'others:Mi"):
        registry.get("scorer", "mine")
    assert registry.get("scorer", "norm").name() == "norm"


def test_names_come_from_class_names():
    class HTTPTwo2ThreeScorer(MineScorer):
        pass

    assert AttentionScorer.name() == "attention"
    assert HTTPTwo2ThreeScorer.name() == "httptwo2_three"
    assert issubclass(AttentionScorer, Part)


def test_importing_the_registry_imports_no_parts_and_no_transformers():
    code = "import sys, tokenprune.registry; print([m for m in sys.modules if 'parts.s' in m or m == 'transformers'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
