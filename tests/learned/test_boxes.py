"""The aim `boxes`: which tokens a box touches, the loss on them, and that a fit learns from them what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tokenprune.cli.main import app
from tokenprune.core.grids import ClassToken, Tiles
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.boxes import BoxesObjective, box_loss, touched
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.objectives import Prompts
from tokenprune.fitting.written import learned_parts
from tokenprune.recipe import load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import training_cases


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


def test_a_box_touches_the_cells_that_it_overlaps() -> None:
    boxes = [(0.3, 0.0, 0.5, 0.5), (0.0, 0.6, 0.01, 1.0)]
    found = touched([[(1, 2, 4)], [(1, 3, 2)]], boxes, 8)
    assert found.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0, 0]]
    # An overview behind a class token, and tiles whose rows end with a separator.
    tiled = touched([[ClassToken(), (1, 1, 2), Tiles(1, 2, 3)]], [(0.6, 0.0, 1.0, 1.0)], 9)
    assert tiled.nonzero()[:, 1].tolist() == [2, 4, 7]
    with pytest.raises(InputError, match="aim boxes: sample 1 has no box"):
        touched([[(1, 2, 4)], [(1, 3, 2)]], [boxes[0], None], 8)


def test_the_loss_is_dice_and_a_tenth_of_cross_entropy_and_padding_has_none() -> None:
    scores = torch.tensor([[0.0, math.log(3), -math.log(3), -torch.inf], [2.0, 2.0, 2.0, 2.0]])
    wanted = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    dice = 1 - 2 * (0.5 + 0.75) / (0.5 + 0.75 + 0.25 + 2)
    each = (math.log(2) + 2 * math.log(4 / 3)) / 3
    assert float(box_loss(scores[:1], wanted[:1], valid[:1])) == pytest.approx(dice + 0.1 * each, rel=1e-5)
    nothing = float(box_loss(scores[1:], wanted[1:], valid[1:]))
    assert nothing == pytest.approx(1 + 0.1 * math.log(1 + math.exp(2)), rel=1e-4)
    assert float(box_loss(scores, wanted, valid)) == pytest.approx((dice + 0.1 * each + nothing) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["glimpseprune-token", "text-conditioned"])
def test_boxes_teach_every_parameter(name: str, embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    stages = fresh_stages(load_recipe(name), host_of(anatomy(model)))
    part = next(iter(learned_parts(stages).values())).requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    cases = [case for case in training_cases(4) if case.target is not None][:4]
    prompts = Prompts(*zip(*[(case.picture(), case.question, case.target) for case in cases], strict=True))  # type: ignore[arg-type]
    BoxesObjective(Chat("", model, processor), stages, Plan(aim="boxes")).loss(prompts, torch.Generator()).backward()
    assert all(value.grad is not None and value.grad.any() for value in part.parameters())


def test_a_fit_learns_from_them(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    """Questions without a box are left out; the loss on held-out pictures falls."""
    cases = training_cases(16)
    assert 0 < sum(case.target is not None for case in cases) < len(cases)
    plan = Plan(aim="boxes", steps=12, batch=6, rate=1e-2, held_out=0.2)
    fitted = fit(*embedded, "glimpseprune-token", cases, tmp_path, plan=plan)
    assert min(loss for _, loss in fitted.looks) < fitted.looks[0][1] - 0.03
    assert load_recipe(fitted.recipe).stages[0].name == "glimpse"


def test_what_boxes_cannot_teach_is_told(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    cases = [case for case in training_cases(4) if case.target is None]
    with pytest.raises(InputError, match=rf"aim boxes: none of {len(cases)} questions has a box.*--aim logits"):
        fit(*embedded, "glimpseprune-token", cases, tmp_path / "a", plan=Plan(aim="boxes"))
    boxed = next(case for case in training_cases(4) if case.target is not None)
    with pytest.raises(InputError, match=r"at least 2 pictures, .* got 1 \(with --aim boxes, questions that"):
        fit(*embedded, "glimpseprune-token", [boxed, *cases], tmp_path / "c", plan=Plan(aim="boxes"))
    with pytest.raises(InputError, match="recycler 'convolution' does not score, so boxes cannot teach it"):
        fit(*embedded, "fcot-vl", training_cases(4), tmp_path / "b", plan=Plan(aim="boxes"))


@pytest.mark.parametrize("box", ["[0.5, 0.1, 0.2, 0.9]", "[0.1, 0.2, 0.9]", "[0.1, 0.1, 1.5, 0.9]", '"left"', "7"])
def test_a_box_that_is_none_is_told_with_its_line(box: str, tmp_path: Path) -> None:
    training_cases(1)[0].picture().save(tmp_path / "one.png")
    good = json.dumps({"image": "one.png", "question": "what ?", "box": [0.1, 0.1, 0.5, 0.9]})
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{good}\n{{"image": "one.png", "question": "what ?", "box": {box}}}\n', encoding="utf-8")
    told = ["fit", "glimpseprune-token", "--aim", "boxes", "--data", str(tmp_path), "--questions", str(file)]
    result = CliRunner().invoke(app, [*told, "--output", str(tmp_path / "out")])
    assert result.exit_code != 0
    message = " ".join((result.output + str(result.exception or "")).split())
    assert "rows.jsonl:2" in message and "as [left, top, right, bottom] within 0 to 1" in message
