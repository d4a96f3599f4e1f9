"""A learned request for the full picture: it learns what needs one, is counted, and is refused where it cannot ask."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import nn

import tokenprune as tp
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError, RecipeError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.lessons import Known, RequestLesson, lesson
from tokenprune.fitting.rewards import Rewards, group_advantages
from tokenprune.parts.learned import Host
from tokenprune.parts.request import RequestHead
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.recipe.again import Again
from tokenprune.recipe.weights import digest
from tokenprune.scenes import load_embedded, samples
from tokenprune.scenes.cases import scene_cases, training_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import difference
from tokenprune.twice import full_pass, one_pass

WIDTH = 16
POOLED = load_recipe("visionthink", variant="pooled")


@pytest.fixture(scope="module")
def embedded() -> Chat:
    return Chat("", *load_embedded())


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return training_cases(6, tasks=["colour", "size"])


@pytest.fixture(scope="module")
def fitted(embedded: Chat, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    return fit(*embedded, POOLED, cases, folder, plan=Plan(aim="reward", steps=4, batch=4)).recipe


def questions(count: int, seed: int) -> list[Known]:
    """A third need the full picture; which ones, a direction in the states says."""
    states = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    states -= states.mean(1, keepdim=True)
    return [Known(state, bool(state[0] - state[1] < 0.6), True) for state in states]


def request_lesson(rewards: Rewards | None = None) -> RequestLesson:
    return RequestLesson(
        Chat("", None, None), POOLED, Plan(aim="reward", rewards=rewards or Rewards()), Host("", WIDTH)
    )


def test_rewards_teach_a_head_which_questions_need_the_full_picture() -> None:
    taught = request_lesson()
    head = taught.parts["request"].requires_grad_(True)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    known = questions(512, 0)
    losses = []
    for step in range(150):
        start = 32 * step % 512
        loss = taught.loss(known[start : start + 32], torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    unseen = questions(256, 1)
    asks = head(torch.stack([each.state for each in unseen])).sigmoid() > 0.5
    direct = torch.tensor([each.first for each in unseen])
    assert asks[~direct].float().mean() > 0.9 > 0.1 > asks[direct].float().mean()
    # What is told is what rewards are short of 1. Half of the first step's rollouts ask: that leaves the questions that
    # need the full picture in the other half, and a tenth of the rest in this one. In the end little of either.
    needs = sum(not each.first for each in known[:32]) / 32
    assert losses[0] == pytest.approx((needs + 0.1 * (1 - needs)) / 2, abs=0.04)
    assert sum(losses[-16:]) / 16 < 0.06


def test_the_gradient_is_that_of_the_policy_and_the_value_that_of_the_rewards() -> None:
    rewards = Rewards(rollouts=8)
    taught = request_lesson(rewards)
    head: Any = taught.parts["request"].requires_grad_(True)
    nn.init.constant_(head.out.bias, 0.3)
    known = questions(20, 2)
    loss = taught.loss(known, torch.Generator().manual_seed(7))
    loss.backward()
    p = torch.tensor(0.3).sigmoid()  # of every question, as the last layer's weights are 0
    asks = torch.rand(20, 8, generator=torch.Generator().manual_seed(7)) < p
    correct = asks | torch.tensor([each.first for each in known])[:, None]
    made = rewards.of(correct, asks)
    # d log π(action) / d log-odds = asks - p
    wanted = -(group_advantages(made) * (asks.float() - p)).mean()
    assert head.out.bias.grad.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert loss.item() == pytest.approx(1 - made.mean().item(), abs=1e-6)


def test_a_fit_leaves_the_model_alone_and_writes_a_recipe_that_asks(
    embedded: Chat, cases: list[Case], tmp_path: Path
) -> None:
    model = embedded.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[int, int, float]] = []
    made = fit(*embedded, POOLED, cases, tmp_path, progress=lambda *each: told.append(each), plan=Plan("reward", 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert [each for each in told if each[2] != each[2]], "while questions are asked, the loss is NaN"
    recipe = load_recipe(made.recipe)
    assert recipe.again is not None and (recipe.again.below, recipe.again.above) == (0.0, 0.5)
    assert recipe.again.weights == f"visionthink.safetensors#{digest(made.weights[0].read_bytes())}"
    assert recipe.fingerprint != load_recipe(POOLED.to_dict(), sets=["again.below=0.0"]).fingerprint
    assert load_recipe(recipe.to_dict()).fingerprint == recipe.fingerprint


def test_a_request_decides_and_is_paid(embedded: Chat, fitted: Path) -> None:
    sample = samples()[0]
    alone = tp.ask(*embedded, sample.path, sample.question, load_recipe(POOLED.to_dict(), sets=["again.below=0.0"]))
    assert alone.passes[0].asks is None
    asks = tp.ask(*embedded, sample.path, sample.question, fitted).passes[0].asks
    assert asks is not None and 0 < asks < 1
    for above, passes in ((asks + 1e-6, 1), (asks - 1e-6, 2)):
        recipe = load_recipe(fitted, sets=[f"again.above={above}"])
        answer = tp.ask(*embedded, sample.path, sample.question, recipe)
        assert len(answer.passes) == passes
        assert answer.passes[0].asks == asks
        width = embedded.model.config.get_text_config().hidden_size
        assert answer.passes[0].multiply_adds - alone.passes[0].multiply_adds == 32 * width + 32  # type: ignore[operator]
        assert answer.passes[0].text == alone.text, "it reads, and changes nothing"
        assert answer.passes[-1].report.vision_tokens.tolist() == [[36 if passes == 1 else 144] * 8]


def test_what_is_learned_from_in_batches_is_what_a_question_alone_gives(embedded: Chat, cases: list[Case]) -> None:
    host = host_of(anatomy(embedded.model))
    asked = [cases[0], replace(cases[1], question=cases[-1].question), *cases[2:4]]  # prompts of several lengths
    probe = _Noted().start(host, seed=0)
    alone = []
    for case in asked:
        inputs = embedded.inputs([case.picture()], case.question)
        first = one_pass(embedded, inputs, POOLED.first_pass, "first", 12, probe)
        alone.append((case, first.text, full_pass(embedded, inputs, 12).text))
        # What is read is what the first token of the answer is made of.
        with torch.no_grad():
            odds = embedded.model.get_output_embeddings()(probe.states[-1])
        assert odds.softmax(-1).max().item() == pytest.approx(first.probability, abs=1e-5)
    states = torch.cat(probe.states)
    for rewards, right in (
        (Rewards(), [[first == full, True] for _, first, full in alone]),
        (Rewards(right="labels"), [[case.right(first), case.right(full)] for case, first, full in alone]),
    ):
        plan = Plan(aim="reward", batch=3, answer_tokens=12, rewards=rewards)
        made = RequestLesson(embedded, POOLED, plan, host)._answers(asked)
        assert torch.allclose(made["states"], states, atol=1e-4)
        assert made["right"].tolist() == right


class _Noted(RequestHead):
    """Keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.states.append(states.clone())
        return super().forward(states)


def test_a_fit_that_was_stopped_asks_nothing_again_and_ends_as_one_that_was_not(
    embedded: Chat, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(aim="reward", steps=6, batch=4, patience=100)
    whole = fit(*embedded, POOLED, cases, tmp_path / "whole", plan=plan)

    def stop(done: int, total: int, loss: float) -> None:
        if loss == loss and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*embedded, POOLED, cases, tmp_path / "stopped", plan=plan, progress=stop)
    monkeypatch.setattr(Chat, "generate", lambda *args, **more: pytest.fail("asked again"))
    resumed = fit(*embedded, POOLED, cases, tmp_path / "stopped", plan=plan)
    assert resumed.losses == whole.losses
    assert resumed.weights[0].read_bytes() == whole.weights[0].read_bytes()
    answers = tmp_path / "stopped" / "answers-0.safetensors"
    for data in (answers.read_bytes()[:100], b"", pickle.dumps({"states": 1})):
        answers.write_bytes(data)
        with pytest.raises(InputError, match=r"answers-0.safetensors is not what a fit leaves"):
            fit(*embedded, POOLED, cases, tmp_path / "stopped", plan=plan)


@dataclass(frozen=True)
class _Unlabelled:
    picture: Any
    question: str


def test_what_cannot_be_rewarded_is_told(embedded: Chat, cases: list[Case], tmp_path: Path) -> None:
    host = host_of(anatomy(embedded.model))
    with pytest.raises(InputError, match=r"visionthink asks again .*aim reward, not logits"):
        lesson(embedded, POOLED, Plan(aim="logits"), host, cases)
    with pytest.raises(InputError, match=r"text-conditioned does not ask again, .* no request to reward"):
        lesson(embedded, load_recipe("text-conditioned"), Plan(aim="reward"), host, cases)
    bare: Sequence[Any] = [_Unlabelled(case.picture, case.question) for case in cases]
    plan = Plan(aim="reward", steps=1, batch=2, rewards=Rewards(right="labels"))
    with pytest.raises(InputError, match=r"labels need questions that know their answer"):
        fit(*embedded, POOLED, bare, tmp_path / "a", plan=plan)
    with pytest.raises(InputError, match=r"144 vision tokens, with full pictures 144"):
        fit(*embedded, "visionthink", cases, tmp_path / "b", plan=Plan(aim="reward", steps=1, batch=2))
    assert not any(tmp_path.iterdir()), "nothing was begun"
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "rewards" not in Plan().to_dict()


def test_weights_that_are_not_there_or_of_something_else_are_refused(
    embedded: Chat, fitted: Path, tmp_path: Path
) -> None:
    sample = samples()[0]

    def ask(recipe: Recipe | Path, chat: Chat = embedded) -> None:
        tp.ask(*chat, sample.path, sample.question, recipe)

    missing = load_recipe(POOLED.to_dict(), sets=["again.weights=gone.safetensors#000000000000"])
    with pytest.raises(RecipeError, match=r"no weights gone.safetensors .*`tokenprune fit` makes them"):
        ask(missing)
    name = fitted.with_name("visionthink.safetensors")
    strange = RequestHead().start(Host("llava", 128), seed=0).to_bytes().replace(b"learned request", b"learned reqxest")
    told = load_recipe(fitted).to_dict()
    for data, message in (
        (name.read_bytes()[:-4] + b"gone", r"has the digest .*, and the recipe means"),
        (pickle.dumps({"state": 1}), r"is no readable safetensors file"),
        (RequestHead().start(Host("other", 8), seed=0).to_bytes(), r"made for other, width 8, and this model is"),
        (strange, r"holds the weights of the learned reqxest"),
    ):
        (tmp_path / "visionthink.safetensors").write_bytes(data)
        if "digest" not in message:
            told["again"]["weights"] = f"visionthink.safetensors#{digest(data)}"
        with pytest.raises((RecipeError, InputError), match=message):
            ask(load_recipe(told).in_folder(tmp_path))
    with pytest.raises(InputError, match=r"made for llava, width 128, .*tokenprune fit RECIPE"):
        ask(fitted, Chat("", build("llava", layers=2), embedded.processor))


def test_recipes_without_a_learned_request_are_as_they_were() -> None:
    assert Again().to_dict() == {"pixels": 0.25, "below": 0.8, "request": None}
    assert Again(above=0.7).to_dict()["above"] == 0.7
    assert load_recipe("visionthink").fingerprint == "a22097641806"
    assert POOLED.fingerprint == "5a91f8b8abb9"


@pytest.mark.slow
def test_the_shipped_request_is_better_than_chance_and_than_its_untrained_self(embedded: Chat) -> None:
    recipe = load_recipe("visionthink", variant="trained")
    cases, rows = scene_cases(40), []
    for case in cases:
        inputs = embedded.inputs([case.picture()], case.question)
        first = one_pass(embedded, inputs, recipe.first_pass, "first", 12, recipe.build_request())
        rows.append((first.asks, case.right(first.text), case.right(full_pass(embedded, inputs, 12).text)))
    asks, small, full = torch.tensor(rows, dtype=torch.float64).T.numpy()
    again = asks > 0.5
    right = again * full + ~again * small
    chance = again.mean() * full + (1 - again.mean()) * small
    pictures = [case.picture_id for case in cases]
    assert difference(right, chance, pictures).above(0)
    assert difference(right, small, pictures).above(0), "untrained, it never asks"
