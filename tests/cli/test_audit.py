"""`tokenprune audit` on the embedded model, on a folder of pictures, and on what it must refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CLI = Callable[..., Any]


def told(outcome: Any) -> dict[str, Any]:
    assert outcome.status == 0, outcome.err
    return dict(json.loads(outcome.out))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    made.mkdir()
    for number, size in enumerate([(56, 84), (112, 84), (84, 84)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(made / f"{number}.png")
    (made / "notes.txt").write_text("no picture")
    return made


def test_last_and_random_on_the_embedded_model(cli: CLI, tmp_path: Path) -> None:
    plot = tmp_path / "bias.png"
    last = told(cli("audit", "last", "--keep", "0.25", "--scenes", "8", "--json", "--save-plot", plot))
    (stage,) = last["stages"]
    assert stage["rows"]["bias"]["value"] == pytest.approx(1)
    assert stage["rows"]["cramers_v"] == pytest.approx(stage["rows"]["cramers_v_most"])
    assert [len(stage["heat"]), len(stage["heat"][0])] == [12, 12]
    assert stage["recall"]["all"]["targets"] == last["pictures"] == 8
    assert last["accuracy"]["all"]["targets"] == 8
    assert sum(last["accuracy"][third]["targets"] for third in ("top", "middle", "bottom")) == 8
    assert last["accuracy"]["all"]["untouched"]["value"] > last["accuracy"]["all"]["reduced"]["value"]
    assert stage["recall"]["top"]["share"]["value"] < stage["recall"]["bottom"]["share"]["value"]
    assert (
        last["reading"][0]
        == "choose: it kept the same places in all 8 scenes: bias index +1.00, +1 is the bottom rows alone"
    )
    with Image.open(plot) as picture:
        assert picture.format == "PNG" and picture.width > 400
    random = told(cli("audit", "random", "--keep", "0.25", "--scenes", "2", "--json"))
    assert abs(random["stages"][0]["rows"]["bias"]["value"]) < 0.2
    assert (last["attention"], random["attention"]) == ([], [])
    assert stage["score_position"] == {"value": 1, "low": 1, "high": 1}  # `last` scores by the raster index itself


def test_batch_size_changes_nothing(cli: CLI) -> None:
    one, many = (told(cli("audit", "fastv", "--scenes", "3", "--batch-size", size, "--json")) for size in (1, 3))
    assert one["stages"] == many["stages"] and one["accuracy"] == many["accuracy"]
    (criterion,) = many["attention"]
    assert (len(criterion["layers"]), len(criterion["heads"]), criterion["stages"]) == (
        8,
        8,
        [one["stages"][0]["name"]],
    )
    for alone, together in zip(one["attention"][0]["heads"], criterion["heads"], strict=True):
        assert alone == pytest.approx(together, abs=1e-4)
    # FastV reads the attention of the layer that ran before its place: the same numbers there.
    before = criterion["layers"][one["stages"][0]["layer"] - 1]
    assert before["value"] == pytest.approx(one["stages"][0]["score_position"]["value"], abs=1e-4)


def test_table_for_people(cli: CLI) -> None:
    done = cli("audit", "sparsevlm", "--keep", "0.3", "--scenes", "2")
    assert done.status == 0 and done.err == ""
    for words in (
        "bias index",
        "before layer",
        "top to bottom",
        "bottom third",
        "late: kept",
        "chi-square",
        "degrees of freedom",
        "Spearman's rho",
        "highest head",
        "right, reduced",
    ):
        assert words in " ".join(done.out.split()), words
    assert "too few to say" in done.out


@pytest.mark.parametrize("model", ["embedded", "qwen", "llava"])
def test_folder_of_pictures_on_any_model(
    cli: CLI, folder: Path, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = model if model == "embedded" else request.getfixturevalue(f"{model}_folder")
    question = "where is the circle ?" if model == "embedded" else "where is the cat ?"
    arguments = ("audit", "fastv", "--images", folder, "--question", question, "--model", name, "--device", "cpu")
    facts = told(cli(*arguments, "--json", "--save-plot", tmp_path / "a.png"))
    assert facts["pictures"] == 3 and facts["accuracy"] is None
    (stage,) = facts["stages"]
    assert 0 < stage["keep"] < 1 and stage["recall"] == {}
    assert len(facts["attention"]) == 1 and facts["attention"][0]["raters"] == "last_text()"
    assert (tmp_path / "a.png").is_file()
    people = cli(*arguments)
    assert people.status == 0 and "target" not in people.out and "upside down" in people.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch",), "nosuch"),
        (("none",), "no stage"),
        (("fastv", "--keep", "2.5"), "--keep"),
        (("fastv", "--scenes", "0"), "--scenes"),
        (("fastv", "--question", "where ?"), "--question needs --images"),
        (("fastv", "--model", "some/model"), "--model needs --images"),
        (("fastv", "--images", "FOLDER"), "--images needs a --question"),
        (("fastv", "--images", "FOLDER", "--question", " "), "--images needs a --question"),
        (("fastv", "--images", "FOLDER", "--question", "x", "--scenes", "5"), "not both"),
        (("fastv", "--images", "FOLDER/none", "--question", "x"), "--images: no such folder"),
        (("fastv", "--images", "EMPTY", "--question", "x"), "--images: no picture"),
        (
            ("fastv", "--images", "BROKEN", "--question", "where is the circle ?"),
            "--images: .*broken.png is not a picture",
        ),
        (("fastv", "--save-plot", "FOLDER/none/a.png"), "--save-plot: no such folder"),
        (("fastv", "--save-plot", "FOLDER/a.jpg"), "--save-plot: expected a name that ends in .png"),
    ],
)
def test_mistakes_are_told_in_a_line(
    cli: CLI, folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"no picture")
    places = {"FOLDER": folder, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    real = []
    for argument in arguments:
        for word, path in places.items():
            argument = argument.replace(word, str(path))
        real.append(argument)
    before = sorted(tmp_path.rglob("*"))
    done = cli("audit", *real, *(() if "--save-plot" in real else ("--save-plot", tmp_path / "plot.png")))
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert re.search(message, done.err), done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_all_broken_pictures_are_told_before_a_model_is_loaded(
    cli: CLI, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.answers.load", lambda *_, **__: pytest.fail("loaded"))
    for name in ("y.png", "z.png"):
        (folder / name).write_bytes(b"no picture")
    done = cli("audit", "fastv", "--images", folder, "--question", "where is the circle ?")
    assert (done.status, done.out) == (2, "")
    told = [f"--images: {folder / name} is not a picture that Pillow can read\n" for name in ("y.png", "z.png")]
    assert done.err == "error: " + "".join(told)


def test_a_picture_that_the_processor_refuses_is_named_before_a_model_is_asked(
    cli: CLI, folder: Path, qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.families.chat.Chat.generate", lambda *_, **__: pytest.fail("asked"))
    Image.new("L", (1200, 4)).save(folder / "z.png")
    done = cli("audit", "fastv", "--images", folder, "--question", "where is the cat ?", "--model", qwen_folder)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"error: --images: {folder / 'z.png'}: the model's processor refuses this input: ")


def test_help_teaches(cli: CLI) -> None:
    done = cli("audit", "--help")
    assert done.status == 0 and "tokenprune audit feather" in done.out and "bias index" in " ".join(done.out.split())
