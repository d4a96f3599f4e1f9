"""`tokenprune run` on the real embedded model, and on tiny random ones from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenprune.cli import ask
from tokenprune.cli.answer import _verdict
from tokenprune.recipe import load_recipe
from tokenprune.scenes import samples


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two timed rounds tell all that these tests ask."""
    monkeypatch.setattr(ask, "ROUNDS", 2)


def told(outcome: Any) -> dict[str, Any]:
    """The one JSON object on stdout of a run without complaints."""
    assert (outcome.status, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_demo_answers_and_draws(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli("run", "--save-plot", tmp_path / "kept.png")
    assert (outcome.status, outcome.err) == (0, "")
    sample = samples()[0]
    for word in (sample.question, "untouched", "reduced", "correct", sample.answer, "sparsevlm", "saved", "next:"):
        assert word in outcome.out
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > 2.5 * picture.height  # the input and three stages
    assert [file.name for file in tmp_path.iterdir()] == ["kept.png"]


def test_json_tells_everything(cli: Callable[..., Any]) -> None:
    sample = samples()[0]
    facts = told(cli("run", "--json"))
    assert facts["recipe"] == "sparsevlm"
    assert facts["fingerprint"] == load_recipe("sparsevlm").fingerprint
    assert (facts["model"], facts["device"], facts["dtype"]) == ("embedded", "cpu", "float32")
    assert (facts["question"], facts["correct_answer"]) == (sample.question, sample.answer)
    assert facts["untouched_answer"] == sample.answer  # the demonstration shows a question that the model answers right
    assert facts["answer"]
    counts = facts["vision_tokens"]
    assert counts[0] == facts["total"]
    assert counts == sorted(counts, reverse=True)
    assert (facts["average"], facts["final"]) == (sum(counts) / len(counts), counts[-1])
    assert [stage["name"] for stage in facts["stages"]] == ["early", "middle", "late"]
    for stage in facts["stages"]:
        assert set(stage) == {"name", "place", "layer", "kept", "merged", "tokens", "seconds"}
        assert stage["kept"] == sorted(set(stage["kept"]))
        assert 0 <= stage["kept"][0] <= stage["kept"][-1] < facts["total"]
        assert stage["tokens"] == len(stage["kept"]) + len(stage["merged"])
    assert len(facts["stages"][-1]["kept"]) + len(facts["stages"][-1]["merged"]) == facts["final"]
    for key in ("seconds", "untouched_seconds", "first_token_seconds", "untouched_first_token_seconds"):
        assert 0 < facts[key] < 600
    assert 0 < facts["method_seconds"] < facts["seconds"]
    assert load_recipe(facts["resolved_recipe"]).fingerprint == facts["fingerprint"]
    assert set(facts["versions"]) == {"python", "tokenprune", "torch", "transformers"}
    assert Path(facts["images"][0]).is_file()


def test_identity_and_one_token(cli: Callable[..., Any]) -> None:
    whole = told(cli("run", "--keep", "1.0", "--json"))
    assert whole["answer"] == whole["untouched_answer"]
    assert set(whole["vision_tokens"]) == {whole["total"]}
    assert whole["saved"] == 0
    assert "no vision token was dropped" in cli("run", "--keep", "100%").out
    one = told(cli("run", "--recipe", "fastv", "--keep", "1", "--json"))
    assert one["vision_tokens"] == [one["total"]] + [1] * (len(one["vision_tokens"]) - 1)


@pytest.mark.parametrize(("budget", "key"), [("--average", "average"), ("--final", "final")])
def test_budgets_are_met(budget: str, key: str, cli: Callable[..., Any]) -> None:
    facts = told(cli("run", budget, "60", "--json"))
    assert 59 < facts[key] <= 60


def test_sets_and_variants_reach_the_model(cli: Callable[..., Any]) -> None:
    facts = told(cli("run", "--recipe", "fastv", "--set", "stages.0.scheduler.keep=10", "--json"))
    assert facts["final"] == 10
    facts = told(cli("run", "--recipe", "fastv", "--variant", "k2-r75", "--json"))
    assert facts["final"] == facts["total"] // 4


def test_shipped_samples_bring_question_and_answer(cli: Callable[..., Any]) -> None:
    sample = samples()[1]
    facts = told(cli("run", "--image", sample.path, "--recipe", "none", "--json"))
    assert (facts["question"], facts["correct_answer"]) == (sample.question, sample.answer)
    facts = told(cli("run", "--image", sample.path, "--question", "is there a blue circle ?", "--json"))
    assert facts["correct_answer"] is None


def test_words_that_the_embedded_model_lacks_are_told(cli: Callable[..., Any]) -> None:
    outcome = cli("run", "--question", "where is the zeppelin?")
    assert outcome.status == 0
    assert outcome.err.startswith("note: the embedded model knows only the words of its scenes, not 'zeppelin'; ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_eager_attention(dtype: str, cli: Callable[..., Any]) -> None:
    facts = told(cli("run", "--dtype", dtype, "--attention", "eager", "--json"))
    assert (facts["dtype"], facts["attention"]) == (dtype, "eager")


def test_qwen_folder_with_several_pictures(
    qwen_folder: Path, picture: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    common = ["run", "--model", qwen_folder, "--device", "cpu", "--question", "where is the cat ?", "--json"]
    plot = tmp_path / "kept.png"
    facts = told(cli(*common, "--image", picture, "--image", picture, "--keep", "0.5", "--save-plot", plot))
    assert facts["total"] == 2 * 20
    assert facts["images"] == [str(picture)] * 2
    assert facts["plot"] == str(plot)
    with Image.open(plot) as drawn:
        drawn.verify()


def test_llava_folder(llava_folder: Path, picture: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    plot = tmp_path / "kept.png"
    arguments = ["--image", picture, "--question", "where is the cat ?", "--recipe", "uniform", "--keep", "4"]
    facts = told(cli("run", "--model", llava_folder, "--device", "cpu", *arguments, "--save-plot", plot, "--json"))
    assert facts["vision_tokens"] == [4, 4, 4, 4]
    assert facts["stages"][0]["layer"] is None
    assert plot.is_file()


def test_recipe_that_does_not_fit_the_model_is_told(tmp_path: Path, cli: Callable[..., Any]) -> None:
    plot = tmp_path / "kept.png"
    outcome = cli("run", "--recipe", "fastv", "--set", "stages.0.place.before_layer=99", "--save-plot", plot)
    assert (outcome.status, outcome.out) == (2, "")
    assert "99" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not plot.exists()


def test_pictures_that_are_no_scenes_are_told(picture: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("run", picture, "where is the cat?")
    assert outcome.status == 0 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("note: the embedded model knows coloured shapes only, and ")
    assert f"{picture} shows none" in outcome.err and "which colour does the cross in the picture have?" in outcome.err


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([2.0] * 7, [1.0] * 7, "first token 2.00× as fast (95 %: 2.00–2.00, paired by round)"),
        ([2.0] * 8, [1.0] * 8, "first token 2.00× as fast (95 %: 2.00–2.00, paired by round)"),
        ([1.05, 0.97, 1.1, 0.9, 1.2], [1.0] * 5, "no difference beyond this run's noise (0.90–1.20× as fast)"),
        ([2.0] * 3, [1.0] * 3, "first token 2.00× as fast, in too few runs to tell that from noise"),
        ([1.0] * 5, [2.0] * 5, "first token 0.50× as fast, which is slower (95 %: 0.50–0.50, paired by round)"),
    ],
)
def test_the_verdict_does_not_turn_on_noise(before: list[float], after: list[float], words: str) -> None:
    report: Any = None
    result = ask.Comparison(ask.Side(first=before), ask.Side(first=after), report, 0.1)
    facts = {"total": 4, "final": 1, "average": 2, "saved": 0.5, "vision_tokens": [4, 1], "model": "x"}
    speedup = result.first_speedup.to_dict()
    assert words in _verdict({**facts, "first_token_speedup": speedup, "method_seconds": 0.1})


def test_a_recipe_that_may_ask_again_tells_which_pass_answered(
    qwen_folder: Path, picture: Path, cli: Callable[..., Any]
) -> None:
    common = ["run", "--model", qwen_folder, "--device", "cpu", picture, "where is the cat ?", "-r", "visionthink"]
    once = told(cli(*common, "--set", "again.below=0", "--json"))
    assert (once["answered_by"], len(once["passes"])) == ("first", 1)
    twice = told(cli(*common, "--set", "again.below=1.0", "--json"))
    assert (twice["answered_by"], twice["answer"]) == ("full", twice["untouched_answer"])
    assert twice["passes"][0] == once["passes"][0]
    small, full = (each["vision_tokens"][0] for each in twice["passes"])
    assert 0 < small < full == 20
    assert once["saved"] > 0 > twice["saved"]
    costs = [each["multiply_adds"] for each in twice["passes"]]
    assert (twice["multiply_adds"], twice["untouched_multiply_adds"]) == (sum(costs), costs[1])
    shown = cli(*common, "--set", "again.below=1.0")
    assert "the full pass answered; both passes counted" in shown.out and "more prefill" in shown.out
    refused = cli(*common, "--save-plot", "kept.png")
    assert refused.status == 2 and "visionthink may ask twice" in refused.err
