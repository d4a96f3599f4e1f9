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
    ModelOption,
    Plugins,
    Sets,
    Variant,
    budgets_of,
)
from tokenprune.cli.terminal import check_plot, note, print_json, progress
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "run"
EXAMPLES = (
    "  tokenprune run",
    "  tokenprune run --recipe fastv --keep 0.25 --save-plot kept.png",
    "  tokenprune run --recipe my.yaml --set stages.0.recycler=drop --json",
    "  tokenprune run --model llava-hf/llava-1.5-7b-hf --image cat.jpg \\",
    "                 --question 'What is on the table?'",
)


def command(
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture file; give it several times for several pictures in one prompt.", metavar="PATH"),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the pictures.", metavar="TEXT")] = None,
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", metavar="N")] = 32,
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of the tokens that each stage kept.", metavar="FILE.png")
    ] = None,
    json_: Json = False,
) -> None:
    """Ask a model about a picture, once with all vision tokens and once with those that a recipe keeps.

    Prints both answers, the vision tokens that enter each layer, what was saved, and the time of both. Without
    arguments it asks the embedded model, a tiny LLaVA that comes with the package, about a picture of coloured shapes.
    """
    budgets = budgets_of(keep, average, final, flops)
    if question is not None and not question.strip():
        raise InputError("--question is empty")
    check_plot(save_plot)
    pictures = [open_picture(path) for path in image or []]

    with progress("reading the recipe"):
        from tokenprune.recipe import load_recipe

        resolved = load_recipe(recipe, variant=variant, sets=sets or (), **budgets)
    paths, pictures, asked, answer = _subject(image or [], pictures, question)
    with progress(f"loading {model}"):
        from tokenprune.answers import load

        chat = load(model, dtype=dtype, device=device, attention=attention)
    inputs = chat.inputs(pictures, asked)
    unknown = chat.unknown_words(asked)
    if unknown:
        words = ", ".join(map(repr, unknown))
        note(
            f"the {model} model knows only the words of its scenes, not {words}; `tokenprune run` shows what it can do"
        )
    with progress("asking twice, with all vision tokens and with fewer"):
        from tokenprune.cli.ask import compare

        result = compare(chat, inputs, resolved, max_new_tokens=max_new_tokens)
    if save_plot is not None:
        with progress("drawing"):
            from tokenprune.plot.kept import plot_kept
            from tokenprune.plot.style import save

            title = f"{resolved.name} · {asked} → {result.reduced.answer}"
            save(plot_kept([chat.seen(picture) for picture in pictures], result.report, title=title), save_plot)

    from tokenprune.cli.answer import as_dict, show

    facts = as_dict(
        result, chat=chat, recipe=resolved, question=asked, images=paths, correct=answer, plot=save_plot, inputs=inputs
    )
    if json_:
        print_json(facts)
    else:
        show(facts, demo=not image and question is None, command={"recipe": recipe, "model": model})


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
            raise InputError("--image needs a --question about it")
        return paths, pictures, found[0].question, found[0].answer
    known = {" ".join(sample.question.lower().split()): sample.answer for sample in found}
    return paths, pictures, question, known.get(" ".join(question.lower().split()))
