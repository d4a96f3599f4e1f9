"""`tokenprune run`: a picture and a question, answered with all vision tokens and with fewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import (
    AttentionOption,
    AverageOption,
    DeviceOption,
    DtypeOption,
    FinalOption,
    FlopsOption,
    Json,
    KeepOption,
    MaxNewTokensOption,
    ModelOption,
    Plugins,
    Sets,
    Variant,
    budgets_of,
)
from tokenprune.cli.strangers import strange_pictures
from tokenprune.cli.terminal import check_plot, note, print_json, progress
from tokenprune.cli.words import pictures_and_question
from tokenprune.core.clip import FRAMES, open_video
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from tokenprune.core.clip import Clip
    from tokenprune.core.report import Report
    from tokenprune.families.chat import Chat

NAME = "run"
EXAMPLES = (
    "  tokenprune run",
    "  tokenprune run photo.jpg 'What is on the table?' \\",
    "                 --model llava-hf/llava-1.5-7b-hf",
    "  tokenprune run --recipe fastv --keep 0.25 --save-plot kept.png",
    "  tokenprune run --recipe my.yaml --set stages.0.recycler=drop --json",
    "  tokenprune run --video clip.mp4 'What happens?' --frames 16 \\",
    "                 --model my-llava-onevision",
    "  tokenprune run --images photos --question 'What is this?' \\",
    "                 --model my-llava --output answers.jsonl --workers 2",
)
BATCH = 8
MEASURED = 2


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PICTURE]... [QUESTION]",
            help="Pictures of one prompt, and what to ask about them.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture file; give it several times for several pictures in one prompt.", metavar="PATH"),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the pictures.", metavar="TEXT")] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Video file instead of pictures, for families that take videos; needs the extra `video`.",
            metavar="PATH",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help=f"Frames of --video, spread evenly; {FRAMES} by default.", metavar="N")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="Recipe by name (see `tokenprune ls`) or by path.", metavar="NAME|PATH"),
    ] = "sparsevlm",
    variant: Variant = None,
    keep: KeepOption = None,
    average: AverageOption = None,
    final: FinalOption = None,
    flops: FlopsOption = None,
    sets: Sets = None,
    plugin: Plugins = None,
    model: ModelOption = "embedded",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = "sdpa",
    max_new_tokens: MaxNewTokensOption = 32,
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of the tokens that each stage kept.", metavar="FILE.png")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Many pictures, each in a prompt of its own: a folder, a pattern in quotes, or a .jsonl file with "
            "image and question. Needs --output.",
            metavar="DIR|GLOB|FILE.jsonl",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the answers about --images; the same command goes on where it stopped.", metavar="FILE.jsonl"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Questions at a time with --images, {BATCH} by default.", metavar="N")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share --images, each with its own model.", metavar="N"),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Spread --images over a Ray cluster: its address, auto, or local. --workers: as many as it has GPUs, "
            "or machines, where not given. Needs the extra 'ray'.",
            metavar="ADDRESS",
        ),
    ] = None,
    measure: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Batches of --images that are asked with all tokens, too, to tell the time saved; {MEASURED} by "
            "default.",
            metavar="N",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Ask a model about a picture or a video, once with all vision tokens and once with those that a recipe keeps.

    Prints both answers, the vision tokens that enter each layer, what was saved, and the time of both. Without
    arguments it asks the embedded model, a tiny LLaVA that comes with the package, about a picture of coloured shapes.
    """
    budgets = budgets_of(keep, average, final, flops)
    paths, question = pictures_and_question(words or [], image or [], question)
    check_plot(save_plot)
    many = {"--output": output, "--batch-size": batch_size, "--workers": workers, "--ray": ray}
    many["--measure"] = measure
    if images is None:
        if strayed := [option for option, value in many.items() if value is not None]:
            raise InputError(f"{strayed[0]} goes with --images, which asks about many pictures")
    elif image or save_plot is not None:
        raise InputError(f"{'--image' if image else '--save-plot'} is for one prompt; leave it out with --images")
    if frames is not None and video is None:
        raise InputError("--frames goes with --video")
    if video is not None and (paths or images is not None):
        raise InputError("--video is for a prompt of its own; leave pictures out")
    pictures = [open_picture(path, "--image" if path in (image or []) else "picture") for path in paths]
    clip = None if video is None else open_video(video, frames or FRAMES, option="--video")

    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), **budgets)
    if resolved.again is not None and (images is not None or save_plot is not None or video is not None):
        option = "--images" if images else "--video" if video else "--save-plot"
        raise InputError(f"{option}: {resolved.name} may ask twice; ask about pictures, in one prompt")
    if images is not None:
        from tokenprune.cli.many import Work, ask_many
        from tokenprune.cli.workers import Loading

        settings = {"variant": variant, "sets": tuple(sets or ()), **budgets}
        loading = Loading(model, dtype, device, attention, tuple(plugin or ()))
        work = Work(loading, recipe, settings, max_new_tokens)
        ask_many(
            [*images, *map(str, paths)],
            question,
            output,
            work,
            recipe=resolved,
            batch_size=batch_size or BATCH,
            workers=workers,
            ray=ray,
            measure=MEASURED if measure is None else measure,
            json=json_,
        )
        return
    demo = not paths and question is None and video is None
    if video is None:
        paths, pictures, asked, answer = _subject(paths, pictures, question)
    elif question is None:
        raise InputError("a video needs a question: tokenprune run --video clip.mp4 'What happens?'")
    else:
        asked, answer = question, None
    with progress(f"loading {model}"):
        from tokenprune.answers import load

        chat = load(model, dtype=dtype, device=device, attention=attention)
    inputs = chat.inputs(pictures if clip is None else [clip], asked)
    strange = strange_pictures(model, paths, [picture.size for picture in pictures])
    if strange:
        note(strange)
    elif unknown := chat.unknown_words(asked):
        missing = ", ".join(map(repr, unknown))
        note(
            f"the {model} model knows only the words of its scenes, not {missing}; "
            "`tokenprune run` shows what it can do"
        )
    if resolved.again is not None:
        from tokenprune.cli import twice

        with progress("asking, and again if not sure"):
            told = {**twice.ask(chat, pictures, paths, asked, resolved, max_new_tokens), "correct_answer": answer}
        if json_:
            print_json(told)
        else:
            twice.show(told)
        return
    with progress("asking twice, with all vision tokens and with fewer"):
        from tokenprune.cli.ask import compare

        result = compare(chat, inputs, resolved, max_new_tokens=max_new_tokens)
    if save_plot is not None:
        with progress("drawing"):
            from tokenprune.plot.style import save

            title = f"{resolved.name} · {asked} → {result.reduced.answer}"
            save(_drawn(chat, pictures, clip, result.report, title), save_plot)

    from tokenprune.cli.answer import as_dict, show

    facts = as_dict(
        result, chat=chat, recipe=resolved, question=asked, images=paths, correct=answer, plot=save_plot, inputs=inputs
    )
    if clip is not None:
        facts["video"] = {"file": str(video), "frames": list(clip.indices), "total": clip.total, "fps": clip.fps}
    if json_:
        print_json(facts)
    else:
        show(facts, demo=demo, strange=bool(strange), command={"recipe": recipe, "model": model})


def _drawn(chat: Chat, pictures: list[Image], clip: Clip | None, report: Report, title: str) -> Figure:
    """What was kept: stage beside stage for pictures, frame beside frame for a video."""
    if clip is None:
        from tokenprune.plot.kept import plot_kept

        return plot_kept([chat.seen(picture) for picture in pictures], report, title=title)
    from tokenprune.core.frames import frames_of
    from tokenprune.plot.film import plot_film

    steps = len(frames_of(report.grids[0]))
    return plot_film([chat.seen(frame, video=True) for frame in clip.steps(steps)], report, title=title)


def _subject(
    paths: list[Path], pictures: list[Image], question: str | None
) -> tuple[list[Path], list[Image], str, str | None]:
    """Pictures, question and, for a shipped sample, the correct answer."""
    from tokenprune.scenes import samples

    shipped = list(samples())
    if not paths:
        paths = [Path(shipped[0].path)]
        pictures = [open_picture(paths[0])]
    found = [sample for sample in shipped if len(paths) == 1 and Path(sample.path).resolve() == paths[0].resolve()]
    if question is None:
        if not found:
            raise InputError("a picture needs a question: tokenprune run photo.jpg 'What is this?'")
        return paths, pictures, found[0].question, found[0].answer
    known = {" ".join(sample.question.lower().split()): sample.answer for sample in found}
    return paths, pictures, question, known.get(" ".join(question.lower().split()))
