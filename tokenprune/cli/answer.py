"""What `tokenprune run` tells: one dictionary, as JSON or as tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.terminal import console, table
from tokenprune.cli.verdicts import speed
from tokenprune.core.place import place_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tokenprune.cli.ask import Comparison
    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe

BAR = 32
"""Width of the longest bar."""


def as_dict(
    result: Comparison,
    *,
    chat: Chat,
    recipe: Recipe,
    question: str,
    images: Sequence[Path],
    correct: str | None,
    plot: Path | None,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything there is to tell about one run, ready for JSON."""
    told = result.report.to_dict()
    total, layers = told["total"][0], told["vision_tokens"][0]
    average = sum(layers) / len(layers)
    stages = [
        {**stage, "kept": stage["kept"][0], "merged": stage["merged"][0], "tokens": stage["tokens"][0]}
        for stage in told["stages"]
    ]
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "model": chat.name,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "device": str(chat.model.device),
        "attention": chat.model.config._attn_implementation,
        "images": [str(path) for path in images],
        "question": question,
        "answer": result.reduced.answer,
        "untouched_answer": result.untouched.answer,
        "correct_answer": correct,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "total": total,
        "vision_tokens": layers,
        "average": average,
        "final": layers[-1],
        "saved": 1 - average / total if total else 0.0,
        **({"feed_forward_tokens": told["feed_forward_tokens"][0]} if "feed_forward_tokens" in told else {}),
        "stages": stages,
        "seconds": result.reduced.seconds,
        "untouched_seconds": result.untouched.seconds,
        "first_token_seconds": result.reduced.first_seconds,
        "untouched_first_token_seconds": result.untouched.first_seconds,
        "first_token_speedup": result.first_speedup.to_dict(),
        "method_seconds": result.method_seconds,
        "timed_runs": len(result.reduced.times),
        "answer_tokens": result.reduced.tokens,
        "untouched_answer_tokens": result.untouched.tokens,
        "plot": None if plot is None else str(plot),
        "resolved_recipe": recipe.to_dict(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of all that has a say in the result."""
    from importlib.metadata import version

    from tokenprune import __version__

    found = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "tokenprune": __version__, **found}


def show(facts: Mapping[str, Any], *, demo: bool, strange: bool, command: Mapping[str, str]) -> None:
    """Print the facts for people; `demo`: nothing was asked for, `strange`: the model cannot know such a picture."""
    from rich.text import Text

    screen = console()
    head = table("", "")
    head.show_header = False
    model = f"{facts['model']} ({facts['dtype']}, {facts['device']}, {facts['attention']})"
    if video := facts.get("video"):
        head.add_row("[dim]video", Text(f"{video['file']} ({len(video['frames'])} of {video['total']} frames)"))
    else:
        head.add_row("[dim]picture", Text(_pictures(facts["images"], demo)))
    head.add_row("[dim]question", Text(facts["question"]))
    head.add_row("[dim]model", Text(model))
    head.add_row("[dim]recipe", Text(f"{facts['recipe']} ({facts['fingerprint']})"))
    screen.print(head)
    screen.print()
    screen.print(_answers(facts))
    runs = facts["timed_runs"]
    screen.print(f"[dim]times: {f'median of {runs} runs' if runs > 1 else 'one run'} each, after a warm-up")
    screen.print()
    screen.print(_layers(facts["vision_tokens"]))
    if facts["stages"]:
        screen.print()
        screen.print(_stages(facts["stages"]))
    screen.print()
    screen.print(_verdict(facts))
    if facts["plot"]:
        screen.print(f"picture of the kept tokens: {facts['plot']}", soft_wrap=True, markup=False)
    screen.print(f"[dim]next:[/] {_hint(facts, demo, strange, command)}")


def _pictures(paths: Sequence[str], demo: bool) -> str:
    """The files as given; that of the demonstration lies deep inside the package and goes by its name."""
    return f"{Path(paths[0]).name}, a sample of the package" if demo else ", ".join(paths)


def _answers(facts: Mapping[str, Any]) -> RenderableType:
    made = table("", ">tokens a layer", ">first token", ">whole answer", "answer")
    for name, prefix, count in (("untouched", "untouched_", facts["total"]), ("reduced", "", facts["average"])):
        first, whole = facts[f"{prefix}first_token_seconds"], facts[f"{prefix}seconds"]
        made.add_row(name, f"{count:.4g}", _time(first), _time(whole), _text(facts[f"{prefix}answer"]))
    if facts["correct_answer"] is not None:
        made.add_row("[dim]correct", "", "", "", _text(facts["correct_answer"]))
    return made


def _layers(counts: Sequence[int]) -> RenderableType:
    """Layers that see equally many vision tokens share a line."""
    made = table("layers", ">vision tokens in", "")
    most, start = max([*counts, 1]), 0
    for count, group in groupby(counts):
        end = start + len(list(group)) - 1
        bar = "█" * max(1, round(BAR * count / most)) if count else ""
        made.add_row(str(start) if start == end else f"{start}–{end}", str(count), f"[cyan]{bar}")
        start = end + 1
    return made


def _stages(stages: Sequence[Mapping[str, Any]]) -> RenderableType:
    made = table("stage", "place", ">kept", ">merged", ">time")
    for stage in stages:
        kept, merged = (str(len(stage[key])) for key in ("kept", "merged"))
        made.add_row(
            str(stage["name"]), place_name(stage["place"], stage["layer"]), kept, merged, _time(stage["seconds"])
        )
    return made


def _verdict(facts: Mapping[str, Any]) -> str:
    """What was saved, and honestly what it cost."""
    total, final, layers = facts["total"], facts["final"], len(facts["vision_tokens"])
    fed = facts.get("feed_forward_tokens", facts["vision_tokens"])
    if not total or sum(fed) == total * layers:
        return "no vision token was dropped"
    saved = f"[bold]{facts['saved']:.0%} of the vision tokens saved[/] on average over {layers} layers"
    if fed != facts["vision_tokens"]:
        saved += f", in feed-forwards {1 - sum(fed) / total / layers:.0%} (dropped: skip_ffn)"
        final = fed[-1]
    found = facts["first_token_speedup"]
    ratio, low, high = found["value"], found["low"], found["high"]
    told = speed("first token", ratio, low, high)
    if high is not None and high < 1 and facts["model"] == "embedded":
        told += ": the model is too small to gain time"
    method = f"the method itself took {_time(facts['method_seconds'])}"
    return f"{saved}, {final} of {total} left at the end\n{told}; {method}"


def _hint(facts: Mapping[str, Any], demo: bool, strange: bool, command: Mapping[str, str]) -> str:
    if strange:
        return "the same with --model and a LLaVA or Qwen-VL folder or hub id: its answers will mean something"
    if facts["answer"] != facts["untouched_answer"]:
        picture = "" if facts["plot"] else "--save-plot kept.png shows what was kept; "
        other = "pyramiddrop" if command["recipe"] != "pyramiddrop" else "fastv"
        return f"the answers differ: {picture}try --keep 0.75 or --recipe {other}"
    if facts["plot"] is None and demo:
        return "tokenprune run --save-plot kept.png shows which tokens were kept; try --keep 16 or --recipe fastv too"
    if command["model"] == "embedded":
        return "tokenprune ls lists more recipes; --model takes a LLaVA or Qwen-VL folder or hub id"
    return "a smaller budget (--keep 0.1) saves more; tokenprune ls lists more recipes"


def _text(answer: str) -> RenderableType:
    from rich.text import Text

    return Text(answer or "(nothing)", style="bold")


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
