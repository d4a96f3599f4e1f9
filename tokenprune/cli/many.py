"""`tokenprune run --images`: one question about many pictures, or a list of them, answered into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.strangers import strange_pictures
from tokenprune.cli.terminal import check_folder, console, counter, note, print_json, progress, table
from tokenprune.cli.verdicts import speed
from tokenprune.errors import InputError

if TYPE_CHECKING:
    from tokenprune.families.load import Kernel
    from tokenprune.recipe import Recipe
    from tokenprune.study.many import Alone, Answerer, AnswersFile, Line, Measured, OnRay, Pool


@dataclass(frozen=True)
class Work:
    """What one process loads and runs, as plain data: it travels to other processes."""

    model: str
    dtype: str | None
    device: str | None
    attention: Kernel
    recipe: str
    recipe_settings: Mapping[str, Any]
    """Other arguments of `load_recipe`."""
    plugins: Sequence[Path]
    max_new_tokens: int

    def anywhere(self) -> Work:
        """The same with whole paths: workers elsewhere do not start in this folder."""
        model, recipe = (
            str(Path(name).resolve()) if Path(name).exists() else name for name in (self.model, self.recipe)
        )
        return replace(self, model=model, recipe=recipe, plugins=tuple(path.resolve() for path in self.plugins))

    def __call__(self, number: int, count: int) -> Answerer:
        """The answerer of worker `number` of `count`."""
        from tokenprune.answers import load
        from tokenprune.recipe import load_recipe
        from tokenprune.registry import trying
        from tokenprune.study.many import Answerer

        # The command itself has the plug-ins already, and a name can be given once.
        with trying(self.plugins if count > 1 else ()):
            recipe = load_recipe(self.recipe, **self.recipe_settings)
            device = device_of(self.device, number, _gpus())
            chat = load(self.model, dtype=self.dtype, device=device, attention=self.attention)
            return Answerer(chat, recipe, self.max_new_tokens)


def device_of(device: str | None, number: int, gpus: int) -> str | None:
    """The device of worker `number`: where several GPUs are meant, the workers take them in turn."""
    return f"cuda:{number % gpus}" if gpus > 1 and number > 0 and device in (None, "cuda") else device


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


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
    if strange := strange_pictures(work.model, [line.path for line in lines], [line.size for line in lines]):
        note(strange)
    with progress(f"loading {work.model}"):
        from tokenprune.study.many import AnswersFile, in_batches

        pool = _pool(work, workers, ray)
        pool.__enter__()
    try:
        file = AnswersFile(output, lines, pool.run)
        batches = [batch for batch in in_batches(lines, batch_size) if any(lines[i] not in file for i in batch)]
        found = len(file.answers)
        seconds, measured = _ask(pool, file, [[lines[i] for i in batch] for batch in batches], measure, len(lines))
    finally:
        pool.__exit__(None, None, None)
    file.finish()
    facts = _facts(file, lines, found, seconds, measured)
    facts = {"recipe": recipe.name, "fingerprint": recipe.fingerprint, "model": work.model, **pool.facts, **facts}
    if json:
        from tokenprune.cli.answer import versions

        print_json({**facts, "workers": workers or 1, "ray": ray, "batch_size": batch_size, "versions": versions()})
    else:
        _show(facts, lines, file)
    if facts["refused"]:
        raise InputError(f"{facts['refused']} of {len(lines)} were refused; {output} says why in their lines: error")


def _pool(work: Work, workers: int | None, ray: str | None) -> Alone | Pool | OnRay:
    """This process, several, or a cluster."""
    from tokenprune.study.many import Alone, OnRay, Pool

    if ray is not None:
        return OnRay(work.anywhere(), ray, workers)
    return Alone(work) if workers in (None, 1) else Pool(work, workers)


def _ask(
    pool: Alone | Pool | OnRay, file: AnswersFile, batches: list[list[Line]], measure: int, total: int
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
