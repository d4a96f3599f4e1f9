"""`tokenprune tune`: the best recipe for a model, its questions and a budget, found on one half of the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.eval_cases import (
    SCENES,
    AgreeOption,
    BatchSizeOption,
    ImagesOption,
    TaskOption,
    asked_cases,
    check_asked,
    note_unknown,
)
from tokenprune.cli.options import (
    AttentionOption,
    AverageOption,
    DeviceOption,
    DtypeOption,
    FlopsOption,
    Json,
    MaxNewTokensOption,
    ModelOption,
    Plugins,
    Sets,
    amount,
    share,
)
from tokenprune.cli.terminal import Count, counter, note, print_json, progress
from tokenprune.cli.workers import Loading, RayOption, WorkersOption, respondents
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.study.tune import Space, Tuned

NAME = "tune"
EXAMPLES = (
    "  tokenprune tune --average 0.25 --output runs/tune",
    "  tokenprune tune fastv --average 0.25 --output runs/fastv \\",
    "                  --choose stages.0.scorer=attention,norm,question \\",
    "                  --choose stages.0.sampler=top_k,max_min,determinant \\",
    "                  --choose 'stages.0.place={before_layer: 1/16},after_vision'",
    "  tokenprune tune --space my-space.yaml --flops 0.5 --trials 100 \\",
    "                  --output runs/mine",
    "  tokenprune tune --average 0.25 --agree --model ./my-llava --images photos \\",
    "                  --questions questions.jsonl --output runs/photos",
)
WINNER_FILE, PLOT_FILE = "winner.yaml", "pareto.png"


def command(
    output: Annotated[
        Path,
        typer.Option(
            help=f"Folder for {WINNER_FILE}, {PLOT_FILE} and all results; the same command goes on where it stopped.",
            metavar="DIR",
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Recipe to change, by name (see `tokenprune ls`) or path; needs --choose."
        ),
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(help="Values of a key (stages.0.scorer) to choose among. Repeatable.", metavar="PATH=VALUE,VALUE"),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="YAML file with a recipe and its choices instead.", metavar="FILE")
    ] = None,
    average: AverageOption = None,
    flops: FlopsOption = None,
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try beside the one given.", metavar="N")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves, and of the search.", metavar="N")] = 0,
    sets: Sets = None,
    plugin: Plugins = None,
    scenes: Annotated[
        int | None, typer.Option(min=2, help=f"Generated pictures to ask about, {SCENES} by default.", metavar="N")
    ] = None,
    task: TaskOption = None,
    images: ImagesOption = None,
    questions: Annotated[
        Path | None,
        typer.Option(help=".jsonl or .csv with image, question, answer, as for `tokenprune eval`.", metavar="FILE"),
    ] = None,
    agree: AgreeOption = False,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of whatever is random, in the report.", metavar="N")] = 5,
    model: ModelOption = "embedded",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = "sdpa",
    batch_size: BatchSizeOption = 32,
    max_new_tokens: MaxNewTokensOption = 32,
    packed: Annotated[
        bool | None,
        typer.Option("--packed/--no-packed", help="As for `tokenprune eval`: same answers, sooner."),
    ] = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    json_: Json = False,
) -> None:
    """Find the recipe that answers most questions right at a budget, for a model and questions of yours.

    Half of the pictures are chosen on. On the other half, which had no part in the choice, the winner is reported
    beside the recipe as given, random, uniform, last and a smaller image, with paired 95 % intervals.

    Without RECIPE and --space it searches one stage: its place, scorer, sampler and recycler over shipped parts. A
    space with no more combinations than --trials is tried as a whole; a larger one is searched by Optuna, which
    `pip install 'tokenprune-vlm[tune]'` brings. What cannot run on the model at the budget is skipped.

    A run that is killed goes on with the same command and ends as if it had not been; more --trials go on from there.
    """
    if (average is None) == (flops is None):
        raise InputError("give one of --average and --flops: the budget at which all recipes are compared")
    tokens, multiply_adds = amount(average, "--average"), share(flops, "--flops")
    check_asked(scenes, images, questions)
    with progress("reading recipes and questions"):
        searched = _space(recipe, choose, space, sets)
        cases = asked_cases(scenes, task, images, questions, agree=agree, anywhere=ray is not None)
    _check_output(output)
    if packed is None:
        packed = model == "embedded" and questions is None
    with ExitStack() as stack:
        with progress(f"loading {model}"):
            from tokenprune.study.tune import tune_on

            loading = Loading(model, dtype, device, attention, tuple(plugin or ()))
            pool = stack.enter_context(respondents(loading, workers, ray))
        if questions is not None:
            note_unknown(pool, cases)
        with counter("trying recipes, then reporting") as count:
            bar = _Bar(count)
            result = tune_on(
                pool,
                cases,
                searched,
                average=tokens,
                flops=multiply_adds,
                trials=trials,
                seed=seed,
                agree=agree,
                draws=seeds,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                packed=packed,
                output=output,
                on_trial=bar.tried,
                on_batch=bar.reported,
            )
    _write(result, output, model)
    if json_:
        _print_json(result, pool.facts, output, asked="generated scenes" if questions is None else str(questions))
    else:
        from tokenprune.cli.tune_table import show

        show(result, model=model, file=output / WINNER_FILE)


class _Bar:
    """One progress bar for both: recipes that are tried, then batches of the report."""

    def __init__(self, count: Count) -> None:
        self._count, self._done, self._trials = count, 0, 0

    def tried(self, done: int, most: int) -> None:
        self._trials = most
        self._to(done, most)

    def reported(self, done: int, batches: int) -> None:
        self._to(self._trials + done, self._trials + batches)

    def _to(self, done: int, total: int) -> None:
        self._count(done - self._done, total)
        self._done = done


def _space(recipe: str | None, choose: list[str] | None, space: Path | None, sets: list[str] | None) -> Space:
    """The space that the options describe; the default one without any."""
    from tokenprune.study.tune import default_space, make_space, read_choices, read_space

    if space is not None:
        if recipe is not None or choose:
            raise InputError("--space brings its own recipe and choices; leave RECIPE and --choose out")
        return read_space(space, sets=sets or ())
    if recipe is None:
        if choose or sets:
            raise InputError("--choose and --set change a recipe: name one, such as `tokenprune tune fastv --choose …`")
        return default_space()
    if not choose:
        raise InputError(f"{recipe}: nothing to choose; give for example --choose stages.0.sampler=top_k,max_min")
    return make_space(recipe, read_choices(choose), sets=sets or (), origin="--choose")


def _check_output(folder: Path) -> None:
    """Make the folder, before a long run and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: cannot use {folder}: {error.strerror or error}") from None


def _write(result: Tuned, folder: Path, model: str) -> None:
    """The winner and the plot, each whole or not at all."""
    with progress("drawing"):
        from tokenprune.plot.pareto import plot_pareto
        from tokenprune.plot.style import save

        winner = folder / WINNER_FILE
        if winner.exists() and winner.read_bytes() != result.dump(model=model).encode():
            note(f"{winner} was another search's; it is replaced")
        result.save(winner, model=model)
        title = f"{model} · {result.budget}"
        save(plot_pareto(result, title=title), folder / PLOT_FILE)


def _print_json(result: Tuned, facts: Mapping[str, Any], folder: Path, *, asked: str) -> None:
    """The search, the report, and all that they depend on: model, dtype, device, questions, versions."""
    from tokenprune.cli.answer import versions

    made = {"winner_file": str(folder / WINNER_FILE), "plot": str(folder / PLOT_FILE)}
    print_json({**facts, "asked": asked, **made, **result.to_dict(), "versions": versions()})
