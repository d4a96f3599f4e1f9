"""`tokenprune run` with a recipe that may ask again: each pass, which of them answered, and what they cost together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.cli.answer import versions
from tokenprune.cli.terminal import console, table

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.families.chat import Chat
    from tokenprune.recipe import Recipe


def ask(
    chat: Chat, pictures: Sequence[Image], paths: Sequence[Path], question: str, recipe: Recipe, max_new_tokens: int
) -> dict[str, Any]:
    """What came out of the passes, beside the untouched model, ready for JSON."""
    from tokenprune.twice import ask_twice, full_pass

    passes = ask_twice(chat, pictures, question, recipe, max_new_tokens)
    whole = passes[1] if len(passes) > 1 else full_pass(chat, chat.inputs(pictures, question), max_new_tokens)
    known = [each.multiply_adds for each in passes if each.multiply_adds is not None]
    paid, whole_cost = sum(known) if len(known) == len(passes) else None, whole.multiply_adds
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "model": chat.name,
        "images": [str(path) for path in paths],
        "question": question,
        "answer": passes[-1].text,
        "answered_by": passes[-1].name,
        "untouched_answer": whole.text,
        "passes": [
            {
                "name": each.name,
                "answer": each.text,
                "first_token_probability": each.probability,
                "asks": each.asks,
                "vision_tokens": each.report.vision_tokens[0].tolist(),
                "multiply_adds": each.multiply_adds,
            }
            for each in passes
        ],
        "multiply_adds": paid,
        "untouched_multiply_adds": whole_cost,
        "saved": None if paid is None or whole_cost is None else 1 - paid / whole_cost,
        "resolved_recipe": recipe.to_dict(),
        "versions": versions(),
    }


def show(facts: Mapping[str, Any]) -> None:
    """Print the facts for people."""
    from rich.text import Text

    screen = console()
    screen.print(Text(f"{facts['question']}   ({facts['model']}, {facts['recipe']} {facts['fingerprint']})"))
    screen.print()
    learned = any(each["asks"] is not None for each in facts["passes"])
    made = table("pass", ">tokens a layer", ">prefill", ">first token", *[">asks"] * learned, "answer")
    for each in facts["passes"]:
        layers = each["vision_tokens"]
        made.add_row(
            each["name"],
            f"{sum(layers) / len(layers):.4g}",
            _count(each["multiply_adds"]),
            f"{each['first_token_probability']:.1%} sure",
            *[_share(each["asks"])] * learned,
            Text(each["answer"] or "(nothing)", style="bold"),
        )
    made.add_row(
        "[dim]untouched",
        "",
        _count(facts["untouched_multiply_adds"]),
        "",
        *[""] * learned,
        Text(facts["untouched_answer"] or "(nothing)"),
    )
    screen.print(made)
    screen.print()
    screen.print(f"[bold]the {facts['answered_by']} pass answered[/]{_saved(facts['saved'])}")


def _count(multiply_adds: int | None) -> str:
    return "not known" if multiply_adds is None else f"{multiply_adds / 1e9:.3g} GMAC"


def _share(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.1%}"


def _saved(share: float | None) -> str:
    if share is None:
        return ""
    told = f"{share:.0%} of the prefill saved" if share >= 0 else f"{-share:.0%} more prefill than asking once"
    return f"; both passes counted, {told}"
