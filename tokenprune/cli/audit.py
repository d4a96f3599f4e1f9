"""`tokenprune audit`: where in the picture a recipe keeps its tokens, and whether the target's are among them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import (
    DeviceOption,
    DtypeOption,
    Json,
    KeepOption,
    Plugins,
    RecipeArgument,
    Sets,
    Variant,
    amount,
)
from tokenprune.cli.terminal import check_plot, counter, print_json, progress
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat
    from tokenprune.study.audit.survey import Survey

NAME = "audit"
EXAMPLES = (
    "  tokenprune audit fastv --keep 0.25",
    "  tokenprune audit feather --scenes 200 --save-plot bias.png",
    "  tokenprune audit last --keep 0.25        the bottom rows alone: bias index 1",
    "  tokenprune audit fastv --keep 0.25 --set stages.0.scorer.rope=false --json",
    "  tokenprune audit fastv --model llava-hf/llava-1.5-7b-hf --images photos \\",
    "                   --question 'Where is the dog?'",
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def command(
    recipe: RecipeArgument,
    keep: KeepOption = None,
    variant: Variant = None,
    sets: Sets = None,
    plugin: Plugins = None,
    scenes: Annotated[
        int | None, typer.Option(min=2, help="Held-out scenes to ask the embedded model about; 50 when left out.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Audit over the pictures in this folder instead.", metavar="DIR")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="With --images: what to ask about each picture.", metavar="TEXT")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="With --images: 'embedded', a folder, or a hub id.", metavar="NAME")
    ] = "embedded",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Scenes asked about at a time; pictures of a folder go one by one.", metavar="N")
    ] = 16,
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG with a heat map of each stage.", metavar="FILE.png")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure the position bias of a recipe: where in the picture it keeps tokens, stage by stage.

    Prints the mean height of the kept tokens (0 top, 1 bottom), the bias index (0 even, 1 exactly the bottom rows, -1
    exactly the top rows), Cramér's V of the rows (0 all alike; then the most that the budget allows), and how many of
    the kept tokens lie in each third. Spearman's rho tells how much scores follow the raster order; for recipes that
    score by attention, in every layer of the untouched model, too. Brackets hold 95 % intervals over pictures.

    Without --images it asks the embedded model where things are in held-out scenes. Their targets are known, so it adds
    how many of the target's tokens were kept, and the accuracy by the third that the target lies in.
    """
    _check(scenes, images, question, model, save_plot)
    with progress("reading pictures"):
        folder = None if images is None else _pictures(images)
    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), keep=amount(keep, "--keep"))
    if not resolved.stages:
        raise InputError(f"recipe {resolved.name!r} has no stage: it keeps every token, so there is nothing to audit")
    with progress(f"loading {model}"):
        from tokenprune.answers import load

        chat = load(model, dtype=dtype, device=device)
    if folder is not None and question is not None:
        _check_processor(chat, folder, question)

    from tokenprune.study.audit.survey import audit, audit_cases

    what = "scenes" if folder is None else "pictures"
    many = len(folder) if folder is not None else scenes or 50
    with counter("auditing", many) as done:
        if folder is not None and question is not None:
            survey = audit(
                chat, resolved, (open_picture(path, "--images") for path in folder), question, on_picture=done
            )
        else:
            from tokenprune.scenes.cases import localisation_cases

            asked = islice(localisation_cases(), many)
            survey = audit_cases(chat, resolved, asked, batch_size=batch_size, on_picture=done)
    if save_plot is not None:
        with progress("drawing"):
            title = f"{resolved.name} · {model} model · {survey.audit.pictures} {what}"
            _draw(survey, save_plot, title=title)

    from tokenprune.cli.findings import as_dict, show

    facts = as_dict(survey, what=what, recipe=resolved, chat=chat, images=images, question=question, plot=save_plot)
    if json_:
        print_json(facts)
    else:
        show(facts)


def _check(scenes: int | None, images: Path | None, question: str | None, model: str, save_plot: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if images is None:
        if question is not None:
            raise InputError("--question needs --images: the questions about scenes come with them")
        if model != "embedded":
            raise InputError("--model needs --images and --question: the scenes are the embedded model's own")
    else:
        if scenes is not None:
            raise InputError("give --scenes or --images, not both")
        if question is None or not question.strip():
            raise InputError("--images needs a --question, which is asked about each picture")
    check_plot(save_plot)


def _pictures(folder: Path) -> dict[Path, tuple[int, int]]:
    """The picture files of a folder, by name, with their sizes; other files are passed over.

    Raises:
        InputError: no such folder, no picture in it, or files that are none: all of them told, before a model is asked.
    """
    if not folder.is_dir():
        raise InputError(f"--images: no such folder: {folder}")
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except PermissionError:
        raise InputError(f"--images: no permission to read {folder}") from None
    if not found:
        raise InputError(f"--images: no picture ({', '.join(SUFFIXES)}) in {folder}")
    sizes, problems = {}, []
    for path in found:
        try:
            sizes[path] = open_picture(path, "--images").size
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return sizes


def _check_processor(chat: Chat, folder: dict[Path, tuple[int, int]], question: str) -> None:
    """Show the processor a picture of each size, before a model is asked: its refusals go by shape."""
    for path in {size: path for path, size in folder.items()}.values():
        try:
            chat.inputs([open_picture(path, "--images")], question)
        except InputError as error:
            raise InputError(f"--images: {path}: {error}") from None


def _draw(survey: Survey, path: Path, *, title: str) -> None:
    from tokenprune.plot.audit import plot_audit
    from tokenprune.plot.style import save

    save(plot_audit(survey.audit.stages, title=title), path)
