"""`tokenprune run --images`: one question about many pictures, or a list of them, answered into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.strangers import strange_pictures
from tokenprune.cli.terminal import check_folder, console, counter, note, print_json, progress, table
from tokenprune.cli.verdicts import speed
from tokenprune.cli.workers import Loading, whole, workers_of
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.recipe import Recipe
    from tokenprune.study.many import Answerer, AnswersFile, Batch, Done, Line, Measured
    from tokenprune.study.workers import Workers


@dataclass(frozen=True)
class Work:
    """What one process loads and runs, as plain data: it travels to other processes."""

    loading: Loading
    recipe: str
    recipe_settings: Mapping[str, Any]
    """Other arguments of `load_recipe`."""
    max_new_tokens: int

    def anywhere(self) -> Work:
        """As `Loading.anywhere`."""
        return replace(self, loading=self.loading.anywhere(), recipe=whole(self.recipe))

    def __call__(self, number: int, count: int) -> Answerer:
        """The answerer of worker `number` of `count`."""
        from tokenprune.recipe import load_recipe
        from tokenprune.study.many import Answerer

        chat = self.loading(number, count)
        return Answerer(chat, load_recipe(self.recipe, **self.recipe_settings), self.max_new_tokens)


def ask_many(
    sources: Sequence[str],
    question: str | None,
    output: Path | None,
    work: Work,
    *,
    recipe: Recipe,
    batch_size: int,
    workers: int | None,
    ray: str | None,
    measure: int,
    json: bool,
) -> None:
    """Answer every question into `output`, and tell what was saved in total.

    Raises:
        InputError: no output, or as in `read_lines`, `AnswersFile` and `Pool`; at the end, where some were refused.
    """
    from tokenprune.cli.picture_list import read_lines

    if output is None:
        raise InputError("--images needs --output FILE.jsonl for the answers")
    check_folder(output, "--output")
    if output.suffix.lower() != ".jsonl":
        raise InputError(f"--output: expected a name that ends in .jsonl, got {output.name}")
    with progress("reading the pictures"):
        lines = read_lines(sources, question)
    model = work.loading.model
    if strange := strange_pictures(model, [line.path for line in lines], [line.size for line in lines]):
        note(strange)
    with ExitStack() as stack:
        with progress(f"loading {model}"):
            from tokenprune.study.many import AnswersFile, in_batches

            if ray is not None:
                work, lines = work.anywhere(), [replace(line, path=line.path.resolve()) for line in lines]
            pool = stack.enter_context(workers_of(work, workers, ray))
        file = AnswersFile(output, lines, pool.run)
        batches = [batch for batch in in_batches(lines, batch_size) if any(lines[i] not in file for i in batch)]
        found = len(file.answers)
        seconds, measured = _ask(pool, file, [[lines[i] for i in batch] for batch in batches], measure, len(lines))
    file.finish()
    facts = _facts(file, lines, found, seconds, measured)
    facts = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "model": model, **pool.facts, **facts}
    if json:
        from tokenprune.cli.answer import versions

        print_json({**facts, "workers": workers or 1, "ray": ray, "batch_size": batch_size, "versions": versions()})
    else:
        _show(facts, lines, file)
    if facts["refused"]:
        raise InputError(f"{facts['refused']} of {len(lines)} were refused; {output} says why in their lines: error")


def _ask(
    pool: Workers[Batch, Done], file: AnswersFile, batches: list[list[Line]], measure: int, total: int
) -> tuple[float, list[Measured]]:
    """Answer the batches into the file; seconds of all of them, and those that were asked both ways."""
    # Spread over the list: its beginning holds the smallest pictures.
    step = max(1, len(batches) // measure) if measure else 0
    both = {number for number in range(len(batches)) if step and number % step == 0 and number // step < measure}
    seconds, measured = 0.0, []
    with counter("asking", total) as count:
        count(len(file.answers), total)
        for number, done in pool.answers([(batch, number in both) for number, batch in enumerate(batches)]):
            before = len(file.answers)
            file.add(list(zip(batches[number], done.told, strict=True)))
            seconds += done.seconds
            measured += [done.measured] if done.measured is not None else []
            count(len(file.answers) - before, total)
    return seconds, measured


def _facts(
    file: AnswersFile, lines: Sequence[Line], found: int, seconds: float, measured: Sequence[Measured]
) -> dict[str, Any]:
    """Totals, ready for JSON."""
    answers = [entry for entry in file.answers.values() if "error" not in entry]
    total, average = (sum(entry[name] for entry in answers) for name in ("vision_tokens", "average"))
    facts: dict[str, Any] = {
        "output": str(file.path),
        "questions": len(lines),
        "pictures": len({line.image for line in lines}),
        "answered_before": found,
        "answered_now": len(file.answers) - found,
        "refused": len(file.answers) - len(answers),
        "vision_tokens": total,
        "average": average,
        "saved": 1 - average / total if total else 0.0,
        "seconds": seconds,
        "measured": None,
    }
    if measured:
        import numpy as np

        from tokenprune.study.statistics import over_pictures

        own, untouched = (sum(getattr(each, name) for each in measured) for name in ("seconds", "untouched_seconds"))
        ratio = over_pictures(np.asarray([(each.untouched_seconds, each.seconds) for each in measured]), _ratio)
        questions, same = (sum(getattr(each, name) for each in measured) for name in ("answers", "same"))
        facts["measured"] = {
            "questions": questions,
            "batches": len(measured),
            "seconds": own,
            "untouched_seconds": untouched,
            "speedup": ratio.to_dict(),
            "same_answers": same,
            "seconds_saved": seconds * (untouched / own - 1),
        }
    return facts


def _show(facts: Mapping[str, Any], lines: Sequence[Line], file: AnswersFile) -> None:
    from rich.text import Text

    screen = console()
    head = table("", "")
    head.show_header = False
    head.add_row("[dim]model", Text(f"{facts['model']} ({facts['dtype']}, {facts['device']}, {facts['attention']})"))
    head.add_row("[dim]recipe", Text(f"{facts['recipe']} ({facts['fingerprint']})"))
    before = f", {facts['answered_before']} of them before" if facts["answered_before"] else ""
    head.add_row(
        "[dim]answers",
        f"{len(file.answers)} about {facts['pictures']} picture{'' if facts['pictures'] == 1 else 's'}{before}",
    )
    tokens = f"{facts['vision_tokens']:,} → {facts['average']:,.0f} in a layer on average"
    head.add_row("[dim]vision tokens", f"{tokens}, [bold]{facts['saved']:.0%} saved[/]")
    if facts["answered_now"]:
        head.add_row("[dim]time", _time(facts))
    screen.print(head)
    screen.print(f"answers: {facts['output']}", soft_wrap=True, markup=False)


def _time(facts: Mapping[str, Any]) -> str:
    """How long it took, and whether that was less than with all tokens: no more than its interval says."""
    from tokenprune.study.statistics import FEWEST

    told, both = f"{facts['seconds']:.1f} s for {facts['answered_now']} answers", facts["measured"]
    if both is None:
        return told
    found = both["speedup"]
    asked = f"of {both['questions']} asked both ways, {both['same_answers']} got the same answer"
    if found["low"] is None:
        batches = f"{both['batches']} batch{'' if both['batches'] == 1 else 'es'}"
        few = f"{found['value']:.2f}× as fast in {batches}, too few to tell that from noise"
        return f"{told}\n{few}; --measure {FEWEST} tells\n{asked}"
    if found["low"] > 1:
        told = f"{told}, about [bold]{both['seconds_saved']:.1f} s saved[/]"
    return f"{told}\n{speed('answers', found['value'], found['low'], found['high'], 'by batch')}\n{asked}"


def _ratio(seconds: Any) -> Any:
    """How many times as long all tokens took: of columns of both sides' seconds."""
    return seconds[..., 0] / seconds[..., 1]
