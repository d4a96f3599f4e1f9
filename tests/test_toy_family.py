"""A family is one class and one line of the catalogue: nothing else in the package has to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.budget import Budget
from tokenprune.core.grids import Grid
from tokenprune.cost.shape import ClipShape, VisionShape
from tokenprune.engine.packed.generate import check_packable
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families import catalogue
from tokenprune.families.adapter import Adapter, VisionRow
from tokenprune.families.noise import usual_pictures
from tokenprune.families.shape import model_shape
from tokenprune.families.sketch import sketch_config
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases
from tokenprune.study.audit import Audit
from tokenprune.study.bench import bench
from tokenprune.study.evaluate import evaluate, make_conditions

SIDE = 12
"""Patches along a side of the embedded model's one picture."""


class Bare(Adapter):
    """Only what attaching needs: each picture is a stretch of 144 vision tokens."""

    family = "toy_vl"
    title = "Toy-VL"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        if any(run % SIDE**2 for run in row.runs):
            raise InputError(f"expected pictures of {SIDE**2} vision tokens, got runs of {row.runs}")
        return ((1, SIDE, SIDE),) * (sum(row.runs) // SIDE**2)


class Toy(Bare):
    """All of it."""

    packs = True

    def vision_shape(self, config: Any) -> VisionShape:
        vision = config.vision_config
        width, out = vision.hidden_size, config.get_text_config().hidden_size
        return ClipShape(
            layers=vision.num_hidden_layers,
            width=width,
            mlp=vision.intermediate_size,
            matrices=2,
            patch=3 * vision.patch_size**2,
            projector=((width, out), (out, out)),
            side=SIDE,
        )

    def picture(self, config: Any, tokens: int | None = None) -> tuple[Grid, ...]:
        return ((1, SIDE, SIDE),)

    def smaller_picture(self, config: Any, tokens: int) -> tuple[Grid, ...]:
        return ((1, SIDE, SIDE),)  # this family has no other

    def pixels(
        self, config: Any, grids: Sequence[Grid], ids: Tensor, random: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        size = config.vision_config.image_size
        return {"pixel_values": torch.randn(len(ids), 3, size, size, generator=random).to(dtype)}


@pytest.fixture
def toy() -> tuple[Any, Any]:
    """The embedded model and its processor, under a `model_type` that the package does not know."""
    model, processor = load_embedded()
    model.config.model_type = "toy_vl"
    return model, processor


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue with one more line."""
    monkeypatch.setattr(catalogue, "ADAPTERS", (*catalogue.ADAPTERS, Toy()))


@pytest.fixture
def barely_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ADAPTERS", (*catalogue.ADAPTERS, Bare()))


def prompt(model: Any) -> dict[str, Tensor]:
    """A batch of one: four words, a picture of noise, eight words."""
    config, random = model.config, torch.Generator().manual_seed(0)
    picture = torch.full((1, SIDE**2), config.image_token_id)
    words = torch.randint(10, 40, (1, 12), generator=random)
    ids = torch.cat([words[:, :4], picture, words[:, 4:]], dim=1)
    return {"input_ids": ids, **Toy().pixels(config, (), ids, random, model.dtype)}


def test_without_the_line_it_is_unknown(toy: tuple[Any, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attach: no adapter for .* \(model_type 'toy_vl'\)"):
        tp.attach(toy[0], "fastv")


def attaches(model: Any) -> None:
    inputs = prompt(model)
    with torch.no_grad():
        untouched = model(**inputs).logits
        with tp.attach(model, "fastv", keep=0.25) as attached:
            reduced = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, untouched)
    assert attached.report.grids == (((1, SIDE, SIDE),),)
    assert attached.report.vision_tokens[0, [0, -1]].tolist() == [144, 36]
    assert not torch.equal(reduced[:, -1], untouched[:, -1])


def test_attach(toy: tuple[Any, Any], known: None) -> None:
    attaches(toy[0])


def test_flops(toy: tuple[Any, Any], known: None) -> None:
    """The toy's shape is the one that the same weights have under their own name."""
    told = tp.ledger(toy[0].config, "fastv", keep=0.25)
    own = tp.ledger(load_embedded()[0].config, "fastv", keep=0.25)
    assert told.total == 144 and told.reduced == own.reduced and told.untouched == own.untouched


def test_bench(toy: tuple[Any, Any], known: None) -> None:
    told = bench(toy[0], "fastv", rounds=1, text=9, new_tokens=2)
    assert [row.name for row in told.rows] == ["untouched", "fastv", "random", "uniform", "smaller image"]
    assert told.tokens == 144
    assert all(sample.vision > 0 for row in told.rows for sample in row.samples)


@pytest.mark.parametrize("packed", [False, True])
def test_eval(toy: tuple[Any, Any], known: None, packed: bool) -> None:
    """The answers are those of the same weights under the name that the package has always known."""
    conditions = [one for one in make_conditions(["last"], [Budget("keep", 0.5)]) if one.label in ("untouched", "last")]
    cases = scene_cases(1, tasks=("colour", "existence"))
    found, own = (
        evaluate(model, processor, cases, conditions, max_new_tokens=8, packed=packed)
        for model, processor in (toy, load_embedded())
    )
    assert len(found.outcomes) == 2
    assert [one.flops for one in found.outcomes] == [one.flops for one in own.outcomes]
    assert [one.answers for one in found.outcomes] == [one.answers for one in own.outcomes]


def test_audit(toy: tuple[Any, Any], known: None) -> None:
    audit = Audit()
    with tp.attach(toy[0], "last", keep=0.25) as attached, torch.no_grad():
        toy[0](**prompt(toy[0]))
    audit.add(attached.report)
    (stage,) = audit.stages
    assert stage.heat.shape == (SIDE, SIDE) and stage.keep == 0.25


def test_basics_are_enough_to_attach(toy: tuple[Any, Any], barely_known: None) -> None:
    attaches(toy[0])


def test_what_is_not_known_is_refused_and_says_what_to_write(
    toy: tuple[Any, Any], barely_known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = toy
    with pytest.raises(
        UnsupportedModelError, match=r"no shape known for toy_vl \(Toy-VL\): write vision_shape in its adapter, Bare"
    ):
        model_shape(model)
    with pytest.raises(
        UnsupportedModelError, match=r"nobody makes pictures of noise for toy_vl .*: write picture, smaller_pict"
    ):
        usual_pictures(model.config)
    monkeypatch.setattr("tokenprune.families.sketch.read_config", lambda name, also: model.config)
    with pytest.raises(UnsupportedModelError, match=r"vision tower of toy_vl .*: write deepen_tower and wid"):
        sketch_config("x", layers=2)
    with pytest.raises(UnsupportedModelError, match="packed: a picture of Toy-VL does not stand in the prompt"):
        check_packable(model)
