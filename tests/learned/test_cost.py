"""Learned parts cost what they state, in the ledger and in bench; adaptive ones compile by buckets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Row, build, inputs
from pruned import TOLERANCE, worst
from reference import generate_logits
from torch.utils.flop_counter import FlopCounterMode

import tokenprune as tp
from tokenprune.engine.weights import host_of
from tokenprune.families.anatomy import anatomy
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.written import learned_parts, write_weights
from tokenprune.parts.learned import Host, Learned
from tokenprune.parts.part import Part
from tokenprune.parts.work import Work
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import list_learned_recipes, load_recipe
from tokenprune.study.bench import bench

WIDTH, HEADS, TEXT, SIDE, KEPT = 12, 3, 5, 6, 9


def plain() -> tp.Tokens:
    draw = torch.Generator().manual_seed(0)
    return tp.Tokens.from_hidden(
        torch.randn(1, SIDE * SIDE, WIDTH, generator=draw),
        grid=(SIDE, SIDE),
        text=torch.randn(1, TEXT, WIDTH, generator=draw),
    )


def counted(part: Any, tokens: tp.Tokens) -> int:
    """Multiply-adds of the matrix products that run, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if part.role == "scorer":
            part(tokens)
        else:
            kept = torch.arange(0, SIDE * SIDE, SIDE * SIDE // KEPT)[None, :KEPT]
            plan = part(tokens, kept, torch.zeros(1, SIDE * SIDE), KEPT)
            part.states(tokens, plan)
    return int(counter.get_total_flops()) // 2


WORK = Work(
    tokens=SIDE * SIDE,
    kept=KEPT,
    total=SIDE * SIDE,
    text=TEXT,
    raters=1,
    sequence=SIDE * SIDE + TEXT,
    width=WIDTH,
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=4,
)


@pytest.mark.parametrize("name", ["text-conditioned", "bus", "smarttrim", "llava-meteor", "focusllava"])
def test_what_a_learned_part_states_is_what_a_counter_sees(name: str) -> None:
    for stage in fresh_stages(load_recipe(name), Host("", WIDTH, HEADS)):
        for part in stage.parts:
            if isinstance(part, Learned):
                assert part.multiply_adds(WORK) == pytest.approx(counted(part, plain()), rel=0.02)


@pytest.mark.parametrize("name", list_learned_recipes())
def test_every_learned_recipe_is_counted_in_the_ledger(name: str) -> None:
    told = tp.ledger(build("llava"), name, grids=[(1, 5, 5)], text=9, question=5)
    assert told.reduced.unstated == ()
    learned = [part for stage in load_recipe(name).stages for part in stage.parts.values()]
    assert any(issubclass(part.part, Learned) for part in learned)
    assert all(part.part.multiply_adds is not Part.multiply_adds for part in learned)
    assert told.reduced.method > 0
    wider = [f"stages.{stage.name}.{role}.{other}" for stage in load_recipe(name).stages
             for role, part in stage.parts.items() if issubclass(part.part, Learned)
             for other in ("weights=null", "dim=128")]  # fmt: skip
    more = tp.ledger(build("llava"), load_recipe(name, sets=wider), grids=[(1, 5, 5)], text=9, question=5)
    assert more.reduced.method > 1.5 * told.reduced.method


@pytest.fixture
def _no_compiled_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.in_turn(3)
@pytest.mark.usefixtures("_no_compiled_leftovers")
@pytest.mark.parametrize("name", ["smarttrim", "glimpseprune", "focusllava"])
def test_adaptive_learned_recipes_compile_to_the_same(name: str) -> None:
    model = build("llava", layers=4)
    stages = fresh_stages(load_recipe(name), host_of(anatomy(model)))
    draw = torch.Generator().manual_seed(2)
    for stage in stages:
        for parameter in stage.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    pipeline, batch = Pipeline(stages, depth=4, name=name), inputs("llava", model, rows=[Row(), Row()])
    with tp.attach(model, pipeline) as attached:
        expected, expected_logits = generate_logits(model, batch, max_new_tokens=3)
        sizes = [stage.sizes for stage in attached.report.stages]
    with tp.attach(model, pipeline, compile={"backend": "eager"}) as attached:
        sequences, logits = generate_logits(model, batch, max_new_tokens=3)
        assert [stage.sizes for stage in attached.report.stages] == sizes
        assert attached.report.graphs is not None and attached.report.graphs.compiled > 1
    assert torch.equal(sequences, expected)
    assert worst(logits, expected_logits) < TOLERANCE


def test_bench_runs_a_recipe_with_weights_and_counts_its_parts(tmp_path: Path) -> None:
    model = build("llava", layers=4)
    recipe = load_recipe("text-conditioned")
    parts = learned_parts(fresh_stages(recipe, host_of(anatomy(model))))
    path, _ = write_weights(recipe, parts, tmp_path, made_by="a test")
    result = bench(model, path, rounds=1, text=9, new_tokens=1, baselines=False)
    (row,) = [row for row in result.rows if row.name == "text-conditioned"]
    told = tp.ledger(model, path, grids=[(1, 5, 5)], text=9, question=5)
    assert row.reduced.method == told.reduced.method > 0
    assert row.method is not None and row.method > 0
