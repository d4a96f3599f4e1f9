"""The questions that `eval` and `tune` ask (generated scenes, or pictures and questions of one's own), and options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.terminal import note
from tokenprune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tokenprune.study.evaluate import Case, Request, Response
    from tokenprune.study.workers import Workers

SCENES = 100
"""Generated pictures where nobody says how many."""
TaskOption = Annotated[list[str] | None, typer.Option(help="Only this kind of question. Repeatable.", metavar="NAME")]
ImagesOption = Annotated[
    Path | None, typer.Option(help="Folder of your own pictures, with --questions.", metavar="DIR")
]
AgreeOption = Annotated[
    bool,
    typer.Option(
        "--agree", help="Count answers that are the untouched model's, instead of right ones; needs no answers."
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Questions at a time.", metavar="N")]


def check_asked(scenes: int | None, images: Path | None, questions: Path | None) -> None:
    """Raise `InputError` where options that choose the questions do not go together."""
    if (images is None) != (questions is None):
        raise InputError("--images and --questions go together: a folder of pictures, and what to ask about them")
    if scenes is not None and questions is not None:
        raise InputError("--scenes are generated pictures; with --questions leave it out")


def asked_cases(
    scenes: int | None,
    task: list[str] | None,
    images: Path | None,
    questions: Path | None,
    *,
    agree: bool,
    anywhere: bool = False,
) -> list[Case]:
    """The cases that these options ask for.

    Args:
        scenes: how many generated pictures; None with files, or for the default.
        task: kinds of questions; None for all.
        images: folder of one's own pictures.
        questions: file of one's own questions.
        agree: answers may be left out.
        anywhere: pictures are opened elsewhere, too, by whole paths.

    Raises:
        InputError: no such task, or the file or a picture cannot be read.
    """
    if images is None or questions is None:
        from tokenprune.scenes import TASKS
        from tokenprune.scenes.cases import scene_cases

        return scene_cases(SCENES if scenes is None else scenes, tasks=task or TASKS)
    from tokenprune.cli.question_file import read_cases

    cases = read_cases(questions, images.resolve() if anywhere else images, answers=not agree)
    known = sorted({case.task for case in cases})
    for name in task or []:
        if name not in known:
            raise InputError(f"--task: {questions} has {', '.join(known)}, not {name!r}{did_you_mean(name, known)}")
    return [case for case in cases if not task or case.task in task]


def note_unknown(workers: Workers[Request, Response], cases: Sequence[Case]) -> None:
    """Tell which words of the questions the model's vocabulary does not hold."""
    from tokenprune.study.evaluate import UnknownWords

    ((_, unknown),) = workers.answers([UnknownWords([case.question for case in cases])])
    if isinstance(unknown, list) and unknown:
        words = ", ".join(map(repr, list(unknown)[:8])) + (" …" if len(unknown) > 8 else "")
        note(f"the model's vocabulary does not hold these words of the questions: {words}")
