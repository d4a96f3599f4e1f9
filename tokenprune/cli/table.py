"""`tokenprune table`: a paper's table from result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.options import Json
from tokenprune.cli.terminal import check_folder, print_json, progress, write_text
from tokenprune.errors import InputError

NAME = "table"
EXAMPLES = (
    "  tokenprune table runs/none runs/fastv runs/feather",
    "  tokenprune table runs --metric pope=pope_f1_score --csv table.csv",
    "  tokenprune eval fastv feather --average 0.5,0.25 --json > scenes.json",
    "  tokenprune table scenes.json --markdown > table.md",
)


def command(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RESULTS",
            help="Folders or files: *_results.json of lmms-eval, with the samples of --log_samples beside them, and "
            "what `tokenprune eval --json` prints.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric of a task, in place of the first of its file. Several times.", metavar="TASK=NAME"),
    ] = None,
    untouched: Annotated[
        str | None,
        typer.Option(
            help="Method that the others are relative to, where none ran with recipe=none: such as llava_hf.",
            metavar="METHOD",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write a line for each method, budget and task.", metavar="FILE")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a paper's table: methods by tasks at equal budgets, relative to the untouched model.

    Each cell is the task's score, and below it the score relative to the untouched model's. The mean of the relative
    scores is over all tasks. Intervals are paired: both models answered the same questions, which are drawn anew, by
    picture where the file tells pictures. They need the scores of each question: --log_samples of lmms-eval, or
    `tokenprune eval --json`.
    """
    if not results:
        raise InputError("give result files or folders; such as: tokenprune table runs")
    if markdown and json_:
        raise InputError("--markdown and --json: give one of them")
    if csv is not None:
        check_folder(csv, "--csv")
    metrics = _metrics(metric or [])
    with progress("reading results"):
        from tokenprune.study.paper import paper_table, read_runs

        made = paper_table(read_runs(results), metrics=metrics, untouched=untouched)
    from tokenprune.cli import paper_layout

    if csv is not None:
        write_text(csv, paper_layout.as_csv(made), "--csv")
    if json_:
        print_json(made.to_dict())
    elif markdown:
        typer.echo(paper_layout.as_markdown(made), nl=False)
    else:
        paper_layout.show(made)


def _metrics(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (task, _, name) in zip(given, pairs, strict=True):
        if not task or not name:
            raise InputError(f"--metric: expected TASK=NAME such as pope=pope_f1_score, got {text!r}")
    return {task: name for task, _, name in pairs}
