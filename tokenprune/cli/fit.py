"""`tokenprune fit`: learned parts of a recipe get weights for one model; no answers are needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokenprune.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    Json,
    ModelOption,
    Plugins,
    RecipeArgument,
    Sets,
    Variant,
)
from tokenprune.cli.terminal import check_plot, console, print_json, progress
from tokenprune.core.pictures import open_picture
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from tokenprune.fitting.fit import Fitted
    from tokenprune.fitting.lessons import Asked
    from tokenprune.study.cases import Box

NAME = "fit"
EXAMPLES = (
    "  tokenprune fit text-conditioned --output runs/mine      the embedded model",
    "  tokenprune fit visionthink --variant pooled --output runs/twice   asking again",
    "  tokenprune fit text-conditioned --model my-llava/ --data photos/ \\",
    "                 --questions questions.txt --output runs/photos",
    "  tokenprune run --recipe runs/mine/text-conditioned.yaml        what it gives",
)
SCENES = "scenes"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class _Pair:
    """One picture and a question about it."""

    picture: Callable[[], Image]
    question: str
    picture_id: str
    target: Box | None = None


def command(
    recipe: RecipeArgument,
    output: Annotated[
        Path, typer.Option(help="Folder for weights, recipe, log and checkpoint; goes on if it holds this fit.")
    ],
    model: ModelOption = "embedded",
    data: Annotated[
        str, typer.Option(help="A folder of pictures, or 'scenes': generated ones.", metavar="DIR|scenes")
    ] = SCENES,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Questions for a folder: a text file, each line asked about every picture, or JSON lines with image "
            "and question (for --aim boxes, box too: left, top, right and bottom, as shares of the sides).",
            metavar="FILE",
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(min=2, help="Generated scenes, with --data scenes.", metavar="N")] = 2000,
    aim: Annotated[
        Literal["attention", "logits", "boxes", "reward"] | None,
        typer.Option(
            help="What is learned from: where the untouched model looks, what it says (slower), boxes around what is "
            "asked for, which scenes have, or, for a recipe that asks again, rewards. Left out: attention, or reward."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", metavar="N")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Questions in each step.", metavar="N")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that chance decides.", metavar="N")] = 0,
    variant: Variant = None,
    sets: Sets = None,
    plugin: Plugins = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = "sdpa",
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of the losses; OUTPUT/loss.png when left out.", metavar="FILE.png")
    ] = None,
    json_: Json = False,
) -> None:
    """Train the learned parts of a recipe on a frozen model, without answers: what the untouched model does is the aim.

    Of a recipe that asks again (visionthink), what learns is the request for the full picture.

    Stop it at any time: the same command goes on. It writes the weights, and a recipe that names them with their
    digest; that recipe runs wherever another does.
    """
    from tokenprune.recipe import load_recipe

    check_plot(save_plot)
    resolved = load_recipe(recipe, variant=variant, sets=sets or ())
    pairs = _pairs(data, questions, scenes)
    with progress(f"loading {model}"):
        from tokenprune.answers import load

        chat = load(model, dtype=dtype, device=device, attention=attention)

    from tokenprune.fitting import Plan, fit
    from tokenprune.plot.losses import plot_losses
    from tokenprune.plot.style import save

    settings: dict[str, Any] = {"steps": steps, "batch": batch, "seed": seed}
    plan = Plan.usual(resolved, **settings) if aim is None else Plan(aim=aim, **settings)
    try:
        with _bar(steps) as told:
            fitted = fit(chat.model, chat.processor, resolved, pairs, output, plan=plan, progress=told)
    except OSError as error:
        raise InputError(f"--output: cannot write to {output}: {error.strerror or error}") from None
    plot = save_plot or output / "loss.png"
    save(plot_losses(fitted.losses, fitted.looks, title=f"{resolved.name}, {plan.aim}"), plot)
    facts = _facts(fitted, plot)
    if json_:
        print_json(facts)
    else:
        _show(facts, plugin or [], again=resolved.again is not None)


def _pairs(data: str, questions: Path | None, scenes: int) -> Sequence[Asked]:
    """What is asked about what.

    Raises:
        InputError: no such folder or file, no pictures, or no questions.
    """
    if data == SCENES:
        if questions is not None:
            raise InputError("--questions goes with a folder of pictures; scenes bring their own")
        from tokenprune.scenes.cases import training_cases

        return training_cases(scenes)
    folder = Path(data)
    if not folder.is_dir():
        raise InputError(f"--data: no such folder: {data} (or '{SCENES}')")
    if questions is None:
        raise InputError("--data DIR needs --questions: a text file, each line asked about every picture")
    try:
        lines = [line.strip() for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--questions: cannot read {questions}: {reason}") from None
    if not lines:
        raise InputError(f"--questions: {questions} has no questions")
    if questions.suffix == ".jsonl":
        return [_row(folder, questions, number, line) for number, line in enumerate(lines, 1)]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"--data: no pictures in {data} (expected {', '.join(sorted(PICTURES))})")
    return [_Pair(partial(open_picture, path, "--data"), line, str(path)) for path in found for line in lines]


def _row(folder: Path, file: Path, number: int, line: str) -> _Pair:
    """One line of a JSON-lines file."""
    try:
        row: Any = json.loads(line)
        image, question = str(row["image"]), str(row["question"]).strip()
        box = None if row.get("box") is None else _box(row["box"])
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = '{"image": …, "question": …}, and box as [left, top, right, bottom] within 0 to 1, if any'
        raise InputError(f"{file}:{number}: error: expected {expected}, got {line[:60]}") from None
    if not question:
        raise InputError(f"{file}:{number}: error: the question is empty")
    if not (folder / image).is_file():
        raise InputError(f"{file}:{number}: error: no picture {image} in {folder}")
    return _Pair(partial(open_picture, folder / image, "--data"), question, image, box)


def _box(given: Any) -> Box:
    """A box of a JSON-lines file; ValueError for anything else."""
    left, top, right, bottom = map(float, given)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(given)
    return left, top, right, bottom


def _bar(steps: int) -> Any:
    """A progress bar that `fit` can tell; nothing is drawn where nobody watches."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(stderr=True), disable=not console(stderr=True).is_terminal) as bar:
            task = bar.add_task("fitting", total=steps)

            def told(done: int, total: int, loss: float) -> None:
                # What is NaN is the loss of no step: questions are being asked.
                text = "asking" if loss != loss else f"loss {loss:.4f}"
                bar.update(task, completed=done, total=total, description=text)

            yield told

    return shown()


def _facts(fitted: Fitted, plot: Path) -> dict[str, Any]:
    return {
        "recipe": str(fitted.recipe),
        "weights": [str(path) for path in fitted.weights],
        "steps": len(fitted.losses),
        "best_step": fitted.best,
        "held_out_loss": {"start": fitted.looks[0][1], "best": min(loss for _, loss in fitted.looks)},
        "plot": str(plot),
    }


def _show(facts: dict[str, Any], plugins: Sequence[Path], *, again: bool) -> None:
    screen = console()
    losses, steps = facts["held_out_loss"], f"step {facts['best_step']} of {facts['steps']}"
    screen.print(f"held-out loss {losses['start']:.4f} → [bold]{losses['best']:.4f}[/] at {steps}")
    screen.print(f"weights: {', '.join(facts['weights'])}", soft_wrap=True, markup=False)
    screen.print(f"losses:  {facts['plot']}", soft_wrap=True, markup=False)
    parts = "".join(f" --plugin {file}" for file in plugins)  # without them nobody knows the recipe's parts
    eval_ = f"tokenprune eval {facts['recipe']} random uniform{parts} --keep 0.25"
    run = f"tokenprune run --recipe {facts['recipe']}{parts}"  # no other command asks twice
    screen.print(f"[dim]next:[/] {run if again else eval_}", soft_wrap=True)
