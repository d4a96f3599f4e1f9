"""`tokenprune eval`: how many answers stay right, at equal cost, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    DeviceOption,
    DtypeOption,
    Json,
    MaxNewTokensOption,
    ModelOption,
    Plugins,
    Sets,
    amount,
    share,
)
from tokenprune.cli.terminal import check_folder, check_plot, console, counter, note, print_json, progress, write_text
from tokenprune.cli.workers import Loading, RayOption, WorkersOption, respondents
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.budget import Budget, BudgetKind
    from tokenprune.study.evaluate import Evaluation

NAME = "eval"
EXAMPLES = (
    "  tokenprune eval fastv sparsevlm feather --keep 0.5",
    "  tokenprune eval fastv feather --average 0.75,0.5,0.4 --scenes 500 \\",
    "                  --output runs/feather --save-plot accuracy.png",
    "  tokenprune eval fastv --keep 0.25 --set stages.0.scorer.rope=false \\",
    "                 --cost flops --save-plot accuracy.png",
    "  tokenprune eval fastv --keep 0.25 --agree --model ./my-llava \\",
    "                 --images photos --questions questions.jsonl",
    "  tokenprune eval sparsevlm fastv:k3-r75 --task localisation --task counting",
    "  tokenprune eval my.yaml --average 0.5 --model ./my-llava \\",
    "                  --images photos --questions questions.jsonl --csv accuracy.csv",
)


def command(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipes by name (see `tokenprune ls`) or path; NAME:VARIANT takes a published variant.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Vision tokens from the recipe's first place on, for all conditions: counts such as 64 or shares such "
            "as 0.33. Several: 0.5,0.25 or 0.5 0.25.",
            metavar="N|SHARE",
        ),
    ] = None,
    average: Annotated[
        list[str] | None,
        typer.Option(help="The same budgets, as averages over all layers: equal cost.", metavar="N|SHARE"),
    ] = None,
    final: Annotated[
        list[str] | None, typer.Option(help="The same budgets, as what the last stage leaves.", metavar="N|SHARE")
    ] = None,
    flops: Annotated[
        list[str] | None,
        typer.Option(help="The same budgets, as shares of the untouched prefill's multiply-adds.", metavar="SHARE"),
    ] = None,
    sets: Sets = None,
    plugin: Plugins = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help=f"Generated pictures to ask about, {SCENES} by default.", metavar="N")
    ] = None,
    task: TaskOption = None,
    images: ImagesOption = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help=".jsonl or .csv with image, question, answer and, if you like, task and difficulty.", metavar="FILE"
        ),
    ] = None,
    agree: AgreeOption = False,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Draws of whatever is random; 1 also takes one phase of even layouts instead of all.",
            metavar="N",
        ),
    ] = 5,
    baselines: Annotated[bool, typer.Option(help="Run random, uniform, last and a smaller image beside.")] = True,
    model: ModelOption = "embedded",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    attention: AttentionOption = "sdpa",
    batch_size: BatchSizeOption = 32,
    max_new_tokens: MaxNewTokensOption = 32,
    packed: Annotated[
        bool | None,
        typer.Option(
            "--packed/--no-packed",
            help="Run what the questions about a picture share once; same answers. The default for the embedded model "
            "and its scenes.",
        ),
    ] = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps results; the same command goes on where it stopped.", metavar="DIR"),
    ] = None,
    save_plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of accuracy against cost.", metavar="FILE.png")
    ] = None,
    cost: Annotated[Literal["tokens", "flops"], typer.Option(help="What the plot is drawn over.")] = "tokens",
    pairs: Annotated[bool, typer.Option(help="Print the differences between conditions, with p-values.")] = True,
    difficulty: Annotated[bool, typer.Option("--difficulty", help="Print accuracy by difficulty, too.")] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write a line for each condition and task.", metavar="FILE")
    ] = None,
    json_: Json = False,
) -> None:
    """Compare recipes by how many questions the model still answers right, at equal cost, with 95 % intervals.

    Without --questions it asks about generated scenes that the embedded model was not trained on. Beside the recipes
    run the untouched model, random, uniform, last, and a smaller image with as many tokens' worth of pixels.

    An answer is right if its words are exactly those of the expected one, or its box overlaps that one by half or more
    (intersection over union). Differences from the untouched model are
    paired: both answer the same questions. A task that the untouched model answers right in less than 85 % of cases is
    shown, but does not count in the ranking. With --agree an answer is right if its words are the untouched model's.

    --keep compares recipes as their papers count; early layers that still see all tokens are not counted. --average
    gives all of them the same tokens in all layers, --flops the same multiply-adds, their own work included. --set
    changes the recipes, not the baselines beside them.
    """
    names, budgets = _budgets(recipes or [], {"keep": keep, "average": average, "final": final, "flops": flops})
    check_asked(scenes, images, questions)
    check_plot(save_plot)
    if csv is not None:
        check_folder(csv, "--csv")
    with progress("reading recipes and questions"):
        from tokenprune.study.evaluate.conditions import make_conditions

        conditions = make_conditions(names, budgets, draws=seeds, baselines=baselines, sets=sets or ())
        cases = asked_cases(scenes, task, images, questions, agree=agree, anywhere=ray is not None)
    if difficulty and not any(case.difficulty for case in cases):
        raise InputError("--difficulty: none of these questions says how difficult it is")
    if packed is None:
        packed = model == "embedded" and questions is None
    with ExitStack() as stack:
        with progress(f"loading {model}"):
            from tokenprune.study.evaluate import evaluate_on

            loading = Loading(model, dtype, device, attention, tuple(plugin or ()))
            pool = stack.enter_context(respondents(loading, workers, ray))
        if not budgets:
            note("no --keep, --average, --final or --flops: recipes run at their own costs, and without baselines")
        if questions is not None:
            note_unknown(pool, cases)
        with counter("asking, in batches") as count:
            result = evaluate_on(
                pool,
                cases,
                conditions,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                packed=packed,
                output=output,
                on_batch=lambda _, batches: count(1, batches),
            )
    if agree:
        from tokenprune.study.evaluate import agreement

        result = agreement(result)
    if csv is not None:
        from tokenprune.cli.eval_table import as_csv

        write_text(csv, as_csv(result), "--csv")
    if save_plot is not None:
        _draw(result, save_plot, flops=cost == "flops", title=f"{model} · {len(cases)} questions")
    if json_:
        asked = "generated scenes" if questions is None else str(questions)
        _print_json(result, pool.facts, asked=asked, packed=packed)
    else:
        from tokenprune.cli.eval_table import show
        from tokenprune.cli.verdicts import evaluated

        show(result, model=model, pairs=pairs, difficulty=difficulty)
        console().print("[dim]asked packed[/]" if packed else "[dim]asked by generate[/]")
        for line in evaluated(result):
            console().print(f"[bold]{line}")


def _budgets(recipes: Sequence[str], given: dict[BudgetKind, list[str] | None]) -> tuple[list[str], list[Budget]]:
    """Recipes, and the budgets; numbers among the recipes belong to the one budget option that was given."""
    from tokenprune.budget import Budget

    chosen = [kind for kind, values in given.items() if values]
    if len(chosen) > 1:
        options = "--keep, --average, --final and --flops"
        raise InputError(f"give only one of {options}: it sets the budgets of all conditions")
    names = [recipe for recipe in recipes if not _number(recipe)]
    numbers = [recipe for recipe in recipes if _number(recipe)]
    if numbers and not chosen:
        raise InputError(f"{numbers[0]} is no recipe; for a budget write --keep {','.join(numbers)}")
    budgets: list[Budget] = []
    for kind in chosen:
        for text in [*(part for value in given[kind] or [] for part in value.split(",")), *numbers]:
            value = share(text, "--flops") if kind == "flops" else amount(text, f"--{kind}")
            if value is not None and Budget(kind, value) not in budgets:
                budgets.append(Budget(kind, value))
    return names, budgets


def _number(text: str) -> bool:
    return bool(text) and set(text) <= set("0123456789.,%")


def _draw(result: Evaluation, path: Path, *, flops: bool, title: str) -> None:
    with progress("drawing"):
        from tokenprune.plot.accuracy import plot_accuracy
        from tokenprune.plot.style import save

        save(plot_accuracy(result, flops=flops, title=title), path)


def _print_json(result: Evaluation, facts: Mapping[str, Any], *, asked: str, packed: bool) -> None:
    """The results and all that they depend on: model, dtype, device, questions, way of asking, versions."""
    from tokenprune.cli.answer import versions

    told = {"asked": asked, "packed": packed, **result.to_dict(), "samples": result.samples()}
    print_json({**facts, **told, "versions": versions()})
