"""What an audit found: as plain data, and as tables and sentences that say no more than the numbers do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.answer import versions
from tokenprune.cli.terminal import console, table
from tokenprune.core.place import place_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe
    from tokenprune.study.audit import Estimate, StageAudit
    from tokenprune.study.audit.survey import Survey


def as_dict(
    survey: Survey,
    *,
    what: str,
    recipe: Recipe,
    chat: Chat,
    images: Path | None,
    question: str | None,
    plot: Path | None,
) -> dict[str, Any]:
    """The facts, ready for JSON. Intervals hold 95 % over pictures, which `what` calls pictures or scenes."""
    stages = survey.audit.stages
    thirds = {
        name: {
            "targets": tally.targets,
            "untouched": _plain(tally.accuracy("untouched")),
            "reduced": _plain(tally.accuracy("reduced")),
        }
        for name, tally in survey.thirds.items()
    }
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "model": chat.name,
        "device": str(chat.model.device),
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "what": what,
        "pictures": survey.audit.pictures,
        "images": None if images is None else str(images),
        "question": question,
        "stages": [stage.to_dict() for stage in stages],
        "attention": [criterion.to_dict() for criterion in survey.heads.criteria],
        "accuracy": thirds or None,
        "reading": [sentence for stage in stages for sentence in reading(stage, what)],
        "plot": None if plot is None else str(plot),
        "resolved_recipe": recipe.to_dict(),
        "versions": versions(),
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()


def reading(stage: StageAudit, what: str) -> list[str]:
    """Sentences about one stage, and nothing beyond its numbers."""
    bias, name = stage.rows.bias, stage.name
    if stage.rows.mean is None:
        return [f"{name}: no token was kept as it is, so its place says nothing"]
    if bias is None:
        return [f"{name}: every token was kept, so there is no bias to speak of"]
    place, edge = ("low", "+1 is the bottom") if bias.value > 0 else ("high", "-1 is the top")
    index = f"bias index {bias.value:+z.2f}, {edge} rows alone"
    if ((stage.heat == 0) | (stage.heat == 1)).all():
        found = [f"{name}: it kept the same places in all {stage.pictures} {what}: {index}"]
    elif bias.low is None:
        found = [f"{name}: {index}; {stage.pictures} {what} are too few to say how sure that is"]
    elif bias.above(0) or bias.below(0):
        found = [f"{name}: over these {stage.pictures} {what} it kept tokens {place} in the picture: {index}"]
    else:
        found = [f"{name}: over these {stage.pictures} {what} no lean up or down shows ({index})"]
    recall = stage.recall.get("all")
    if recall is not None and recall.share is not None and recall.share.low is not None:
        hit, even = recall.share, stage.keep
        figures = f"({hit.value:.0%} against {even:.0%})"
        if hit.above(even) or hit.below(even):
            more = "more" if hit.above(even) else "less"
            found.append(f"{name}: tokens of the target were kept {more} often than tokens at large {figures}")
        else:
            found.append(f"{name}: no sign that the target's tokens are kept more or less often than others {figures}")
    return found


def show(facts: Mapping[str, Any]) -> None:
    """Print the facts for people."""
    from rich.padding import Padding
    from rich.text import Text

    screen = console()
    head = table("", "")
    head.show_header = False
    about = "held-out scenes, asked where something is" if facts["question"] is None else Text(facts["question"])
    head.add_row("[dim]recipe", Text(f"{facts['recipe']} ({facts['fingerprint']})"))
    head.add_row("[dim]model", Text(f"{facts['model']} ({facts['dtype']}, {facts['device']})"))
    head.add_row(f"[dim]{facts['what']}", Text(f"{facts['pictures']}: {about}"))
    screen.print(head)
    screen.print()
    for stage in facts["stages"]:
        screen.print(Text(_where(stage), style="bold"))
        screen.print(_axes(stage))
        for line in _statistics(stage):
            screen.print(Padding(Text(line, style="dim"), (0, 0, 0, 2)))
    screen.print()
    for criterion in facts["attention"]:
        _print_heads(criterion)
    if facts["accuracy"] is not None:
        screen.print(_targets(facts["stages"], facts["accuracy"]))
        screen.print()
    for sentence in facts["reading"]:
        screen.print(Text(sentence))
    screen.print(f"[dim]{_caution(facts)}")
    if facts["plot"]:
        screen.print(f"heat maps: {facts['plot']}", soft_wrap=True, markup=False)


def _caution(facts: Mapping[str, Any]) -> str:
    if facts["accuracy"] is None:
        return "subjects of pictures may lie low or high themselves: audit the pictures turned upside down, too"
    return "the generator spreads targets evenly; the result is about this small model and says nothing of large ones"


def _where(stage: Mapping[str, Any]) -> str:
    merged = f" and {stage['merged']:.4g} merged" if stage["merged"] else ""
    place = place_name(stage["place"], stage["layer"])
    return f"{stage['name']}, {place}: {stage['kept']:.4g} of {stage['tokens']:.4g} tokens kept{merged}"


def _axes(stage: Mapping[str, Any]) -> RenderableType:
    """Where the kept tokens of a stage lie along both sides of the picture."""
    made = table("", ">mean", ">bias index", ">V", ">in thirds")
    for name, axis in (("  top to bottom", stage["rows"]), ("  left to right", stage["columns"])):
        made.add_row(
            name,
            "–" if axis["mean"] is None else f"{axis['mean']['value']:.3f}",
            _signed(axis["bias"]),
            f"{axis['cramers_v']:.2f} of {axis['cramers_v_most']:.2f}",
            " ".join(f"{part:3.0%}" for part in axis["thirds"]),
        )
    return made


def _statistics(stage: Mapping[str, Any]) -> list[str]:
    """Chi-square of both axes, and how much the scores follow the raster order."""
    sides = ((name, stage[name]) for name in ("rows", "columns"))
    told = (f"{axis['chi_square']:.4g} of {name} ({axis['degrees']} degrees of freedom)" for name, axis in sides)
    lines = [f"chi-square: {', '.join(told)}"]
    if stage["score_position"] is not None:
        lines.append(f"score and raster index: Spearman's rho {_signed(stage['score_position'])}")
    return lines


def _targets(stages: list[Mapping[str, Any]], accuracy: Mapping[str, Any]) -> RenderableType:
    """By the third that the target lies in: the share of its tokens that is kept, and of answers that are right."""
    made = table("target in the", ">whole", ">top", ">middle", ">bottom third")
    names = ("all", "top", "middle", "bottom")
    made.add_row("targets", *(str(accuracy[name]["targets"]) for name in names))
    for stage in stages:
        made.add_row(f"{stage['name']}: kept", *(_percent(stage["recall"][name]["share"]) for name in names))
    for side in ("untouched", "reduced"):
        made.add_row(f"right, {side}", *(_percent(accuracy[name][side]) for name in names))
    return made


def _print_heads(criterion: Mapping[str, Any]) -> None:
    """Layer by layer, how much the score follows the raster index, and the heads that follow it least and most."""
    from rich.text import Text

    screen = console()
    used = f"{', '.join(criterion['stages'])}: {criterion['raters']}, {criterion['scorer']}"
    screen.print(Text(f"score and raster index in each layer of the untouched model, as scored by {used}"))
    made = table(">layer", ">Spearman's rho", ">lowest head", ">highest head")
    for layer, (mean, heads) in enumerate(zip(criterion["layers"], criterion["heads"], strict=True)):
        known = [head for head in heads if head is not None]
        ends = [f"{end(known):+z.2f}" if known else "–" for end in (min, max)]
        made.add_row(str(layer), _signed(mean), *ends)
    screen.print(made)
    screen.print()


def _signed(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    interval = "" if estimate["low"] is None else f" [dim]({estimate['low']:+z.2f} … {estimate['high']:+z.2f})[/]"
    return f"{estimate['value']:+z.2f}{interval}"


def _percent(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "–"
    interval = "" if part["low"] is None else f" [dim]({100 * part['low']:.0f}–{100 * part['high']:.0f})[/]"
    return f"{part['value']:.0%}{interval}"
