"""`tokenprune run photo.jpg "question"`: which words are pictures, which one is the question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenprune.cli import ask
from tokenprune.cli.words import pictures_and_question
from tokenprune.errors import InputError
from tokenprune.scenes import samples


@pytest.mark.parametrize(
    ("words", "options", "wanted"),
    [
        ([], {}, ([], None)),
        (["PIC"], {}, (["PIC"], None)),
        (["PIC", "what is it?"], {}, (["PIC"], "what is it?")),
        (["PIC", "PIC", "what changed"], {}, (["PIC", "PIC"], "what changed")),
        (["what is it?"], {}, ([], "what is it?")),
        (["what is it?"], {"pictures": ["a.png"]}, (["a.png"], "what is it?")),
        (["PIC"], {"question": "what is it?"}, (["PIC"], "what is it?")),
        (["PIC", "b.JPG"], {"pictures": ["a.png"], "question": "what?"}, (["a.png", "PIC", "b.JPG"], "what?")),
    ],
)
def test_words_and_options_together(
    words: list[str], options: dict[str, Any], wanted: tuple[list[str], str | None], picture: Path
) -> None:
    def real(names: list[str]) -> list[str]:
        return [name.replace("PIC", str(picture)) for name in names]

    options = {**options, "pictures": [Path(name) for name in options.get("pictures", [])]}
    found, question = pictures_and_question(real(words), **options)
    assert ([str(path) for path in found], question) == (real(wanted[0]), wanted[1])


def test_a_file_of_any_name_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "photo").touch()
    assert pictures_and_question([str(tmp_path / "photo")]) == ([tmp_path / "photo"], None)


@pytest.mark.parametrize(
    ("words", "question", "message"),
    [
        (["PIC", "what", "is", "it?"], None, "no such picture: what; a question of several words stands in quotes"),
        (["x" * 5000, "what"], None, "no such picture: xxx"),
        (
            ["DIR", "what is it?"],
            None,
            "DIR is a folder; to ask about each of its pictures: tokenprune run ",
        ),
        (["fastv"], None, "no such picture: fastv; a recipe stands behind --recipe, a question of one word behind"),
        ([" "], None, "the question is empty"),
        (["PIC", " "], None, "the question is empty"),
        (["PIC"], " ", "--question is empty"),
    ],
)
def test_words_that_are_neither(words: list[str], question: str | None, message: str, picture: Path) -> None:
    def real(text: str) -> str:
        return text.replace("PIC", str(picture)).replace("DIR", str(picture.parent))

    with pytest.raises(InputError) as error:
        pictures_and_question([real(word) for word in words], question=question)
    assert str(error.value).startswith(real(message))


def test_typed_like_that_it_runs(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "ROUNDS", 1)
    sample = samples()[1]
    ran = cli("run", sample.path, sample.question, "--json")
    facts = json.loads(ran.out)
    assert (facts["images"], facts["question"]) == ([str(sample.path)], sample.question)
    assert facts["correct_answer"] == sample.answer
    missing = cli("run", "photo.jpg", "what is it?")
    assert (missing.status, missing.err) == (2, "error: picture: no such file: photo.jpg\n")
