"""`tokenprune run photo.jpg "question"`: pictures and a question as people type them, beside the options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenprune.core.pictures import picture_suffixes
from tokenprune.errors import InputError


def pictures_and_question(
    words: Sequence[str], pictures: Sequence[Path] = (), question: str | None = None
) -> tuple[list[Path], str | None]:
    """The pictures and the question that plain words and options name together.

    The last word is the question, unless --question was given or a picture is called so; the others are pictures.

    Args:
        words: as typed, without options.
        pictures: of --image.
        question: of --question.

    Raises:
        InputError: a word is no picture, a folder was given as one, or the question is empty.
    """
    rest = list(words)
    if question is None and rest and not _names_picture(rest[-1]):
        question = rest.pop()
        if question.strip() and not (rest or pictures or " " in question.strip()):
            told = "a recipe stands behind --recipe, a question of one word behind --question"
            raise InputError(f"no such picture: {question}; {told}")
    if question is not None and not question.strip():
        raise InputError("--question is empty" if question not in words else "the question is empty")
    for word in rest:
        if os.path.isdir(word):
            many = f"tokenprune run --images {word} --question … --output answers.jsonl"
            raise InputError(f"{word} is a folder; to ask about each of its pictures: {many}")
        if not _names_picture(word):
            raise InputError(f"no such picture: {word}; a question of several words stands in quotes")
    return [*pictures, *map(Path, rest)], question


def _names_picture(word: str) -> bool:
    return os.path.exists(word) or Path(word).suffix.lower() in picture_suffixes()
