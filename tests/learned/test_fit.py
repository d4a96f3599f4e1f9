"""`fit`: it learns, leaves the model alone, goes on where it was stopped, and writes a recipe that runs."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune as tp
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError, RecipeError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.fresh import fresh_stages
from tokenprune.fitting.objectives import LogitsObjective
from tokenprune.fitting.written import learned_parts
from tokenprune.recipe import list_learned_recipes, load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import training_cases
from tokenprune.study.cases import Case


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_embedded()


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return training_cases(12)


PLAN = Plan(steps=6, batch=4, patience=100)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("aim", ["attention", "logits"])
def test_it_learns_and_leaves_the_model_as_it_is(
    aim: Any, embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path
) -> None:
    model, processor = embedded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    fitted = fit(model, processor, "text-conditioned", cases, tmp_path, plan=Plan(aim=aim, steps=8, batch=4))
    assert min(loss for _, loss in fitted.looks) < fitted.looks[0][1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    with tp.attach(model, fitted.recipe, keep=0.3) as attached:
        inputs = processor(images=cases[0].picture(), text="<image> what ?", return_tensors="pt")
        model(**inputs)
    assert attached.report.vision_tokens[0].tolist() == [43] * 8


@pytest.mark.parametrize("name", list_learned_recipes())
def test_predictions_teach_every_parameter_of_every_learned_recipe(
    name: str, embedded: tuple[Any, Any], cases: list[Case]
) -> None:
    model, processor = embedded
    model.requires_grad_(False)
    stages = fresh_stages(load_recipe(name), host_of(anatomy(model)))
    parts = learned_parts(stages)
    draw = torch.Generator().manual_seed(0)
    for part in parts.values():
        part.requires_grad_(True)
        for parameter in part.parameters():
            if not parameter.any():  # nothing goes through what starts at 0
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    goal = LogitsObjective(Chat("", model, processor), stages, Plan(aim="logits", keep=(0.3, 0.3)))
    prompts = [case.picture() for case in cases[:4]], [case.question for case in cases[:4]]
    goal.loss(prompts, torch.Generator().manual_seed(0)).backward()
    silent = {
        f"{place} {parameter}"
        for place, part in parts.items()
        for parameter, value in part.named_parameters()
        if value.grad is None or not value.grad.any()
    }
    # A constant that all scores share decides nothing among them.
    assert not {each for each in silent if not each.startswith("select-scorer own.2.bias")}
    assert all(
        value.grad is None or value.grad.isfinite().all() for part in parts.values() for value in part.parameters()
    )


def test_a_bar_that_scores_are_off_costs_in_the_loss(embedded: tuple[Any, Any], cases: list[Case]) -> None:
    model, processor = embedded
    prompts = [case.picture() for case in cases[:2]], [case.question for case in cases[:2]]
    losses = []
    for above in (0.0, 100.0):
        recipe = load_recipe("smarttrim", sets=[f"stages.first.scheduler.above={above}"])
        stages = fresh_stages(recipe, host_of(anatomy(model)))
        goal = LogitsObjective(Chat("", model, processor), stages, Plan(aim="logits"))
        with torch.no_grad():
            losses.append(goal.loss(prompts, torch.Generator().manual_seed(0)).item())
    assert losses[1] - losses[0] == pytest.approx(100**2, rel=0.1)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path
) -> None:
    model, processor = embedded
    whole = fit(model, processor, "text-conditioned", cases, tmp_path / "whole", plan=PLAN)

    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, processor, "text-conditioned", cases, tmp_path / "stopped", plan=PLAN, progress=stop)
    resumed = fit(model, processor, "text-conditioned", cases, tmp_path / "stopped", plan=PLAN)
    assert resumed.losses == whole.losses
    assert resumed.weights[0].read_bytes() == whole.weights[0].read_bytes()


def test_a_folder_of_another_fit_is_refused(embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path) -> None:
    model, processor = embedded
    short = Plan(steps=1, batch=2)
    fit(model, processor, "text-conditioned", cases, tmp_path, plan=short)
    with pytest.raises(InputError, match="holds another fit \\(plan differs\\)"):
        fit(model, processor, "text-conditioned", cases, tmp_path, plan=Plan(steps=2, batch=2))
    with pytest.raises(InputError, match="data differs"):
        fit(model, processor, "text-conditioned", cases[:-1], tmp_path, plan=short)


def test_files_that_broke_are_told_by_name(embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path) -> None:
    short = Plan(steps=1, batch=2)
    fit(*embedded, "text-conditioned", cases, tmp_path, plan=short)
    for name, left in (("checkpoint.pt", 5000), ("checkpoint.pt", 0), ("fit.json", 20)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
        with pytest.raises(InputError, match=rf"{name} is not what a fit leaves: choose another folder, or empty"):
            fit(*embedded, "text-conditioned", cases, tmp_path, plan=short)


@pytest.mark.parametrize("name", ["checkpoint.pt", "fit.json"])
def test_files_of_something_else_are_told_in_one_line_and_run_nothing(
    name: str, embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path
) -> None:
    short = Plan(steps=1, batch=2)
    fit(*embedded, "text-conditioned", cases, tmp_path, plan=short)
    saved = io.BytesIO()
    torch.save({"step": 1}, saved)
    ran = tmp_path / "ran"
    for data in (b"[]", b"\xff", saved.getvalue(), pickle.dumps(_Touches(ran))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} is not what a fit leaves") as told:
            fit(*embedded, "text-conditioned", cases, tmp_path, plan=short)
        assert len(str(told.value).splitlines()) == 1
        assert "weights_only" not in str(told.value), "no advice to open it without care"
    assert not ran.exists()


class _Touches:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_one_fit_at_a_time_in_a_folder(embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    short = Plan(steps=1, batch=2)

    def again(done: int, total: int, loss: float) -> None:
        with pytest.raises(InputError, match="another fit runs in it"):
            fit(*embedded, "text-conditioned", cases, tmp_path, plan=short)
        told.append(done)

    told: list[int] = []
    fit(*embedded, "text-conditioned", cases, tmp_path, plan=short, progress=again)
    assert told
    assert fit(*embedded, "text-conditioned", cases, tmp_path, plan=short).losses, "free when the first has ended"


def test_what_cannot_be_fitted_is_told(embedded: tuple[Any, Any], cases: list[Case], tmp_path: Path) -> None:
    model, processor = embedded
    with pytest.raises(RecipeError, match="fastv: no part of it learns"):
        fit(model, processor, "fastv", cases, tmp_path / "a")
    with pytest.raises(InputError, match=r"expected at least 2 pictures, .* got 1"):
        fit(model, processor, "text-conditioned", cases[:1], tmp_path / "b")
    with pytest.raises(
        InputError, match=r"aim: expected attention, logits, boxes, reward, got 'logit'.*did you mean 'logits'"
    ):
        Plan(aim="logit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="keep: expected two shares in order"):
        Plan(keep=(0.5, 0.1))
