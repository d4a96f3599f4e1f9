"""Tables of learned recipes, from what benchmarks/learned has measured; tables.py puts them into docs/learned.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LEARNED = Path(__file__).parent.parent / "benchmarks" / "learned"
BESIDE = ("untrained", "random", "uniform")
"""What transfer.py puts beside fits."""
CLEAR = 0.05
"""Of p-values after Holm's correction."""


def shipped() -> str:
    """Shipped weights beside recipes without any, at equal multiply-adds (benchmarks/learned/compare.py)."""
    told = compared()
    lines = [f"{told['questions']} questions about {told['scenes']} held-out scenes."]
    for share in sorted({row["share"] for row in told["rows"] if not row["own_counts"]}):
        rows = [row for row in told["rows"] if not row["own_counts"] and row["share"] == share]
        beside = [other["recipe"] for other in rows[0]["versus"][1:]]
        untouched = percent(rows[0]["untouched"]["accuracy"])
        lines += ["", f"At {share:.0%} of the untouched prefill (untouched: {untouched} right):", ""]
        lines += table("| | right, % | tokens | than untrained | than ", beside)
        for row in rows:
            lines.append(learned(row) + cells(map(better, row["versus"])))
        for other in rows[0]["versus"][1:]:
            lines.append(f"| {other['recipe']} | {percent(other['accuracy'])} | {other['average']:.1f} |")
    return "\n".join(lines) + "\n"


def own_counts() -> str:
    """Recipes that choose their counts, at what these cost (benchmarks/learned/compare.py)."""
    rows = [row for row in compared()["rows"] if row["own_counts"]]
    beside = [other["recipe"] for other in rows[0]["versus"][1:]]
    lines = table("| | prefill | right, % | tokens | than at equal counts | than ", beside)
    for row in rows:
        name, rest = learned(row).split(" | ", 1)
        told = cells(map(better, row["versus"]))
        lines.append(f"{name} | {row['flops_share']:.0%} | {rest}{told}")
    return "\n".join(lines) + "\n"


def looking() -> str:
    """A learned token that looks beside the last text token that does (benchmarks/learned/glimpse.py)."""
    told = json.loads((LEARNED / "glimpse.json").read_text(encoding="utf-8"))
    lines = [f"{told['questions']} questions about {told['scenes']} held-out scenes.", ""]
    lines += [
        "| prefill | taught by | last text token, right, % | learned token, right, % | tokens | learned better by |"
    ]
    lines += ["|---" * 6 + "|"]
    rows = {(row["share"], row["recipe"]): row for row in told["rows"]}
    for share in dict.fromkeys(row["share"] for row in told["rows"]):
        for taught in ("untrained", "answers", "boxes"):
            last, token = (rows[share, f"{who}, {taught}"] for who in ("last", "token"))
            (change,) = (
                each
                for each in told["versus"]
                if (each["share"], each["recipe"], each["than"].split(",")[0]) == (share, f"token, {taught}", "last")
            )
            found = " | ".join(percent(row["accuracy"]) for row in (last, token))
            kept = ", ".join(f"{row['final']:.1f}" for row in (last, token))
            lines.append(f"| {share:.0%} | {taught} | {found} | {kept} | {better(change)} |")
        lines.append(f"| {share:.0%} | (uniform) | {percent(rows[share, 'uniform']['accuracy'])} |")
    return "\n".join(lines) + "\n"


def transfer() -> str:
    """Fits on one half of the tasks, asked the other (benchmarks/learned/transfer.py)."""
    told = json.loads((LEARNED / "transfer.json").read_text(encoding="utf-8"))
    lines = table("| asked | taught | right, % | each fit | than taught these | than ", BESIDE)
    for part in told["on_tasks"]:
        names = {part["half"]: "these", part["other"]: "the others", "all": "all"}
        asked = f"{part['half']}: {', '.join(part['tasks'])}"
        for row in part["rows"]:
            versus = list(row["versus"])
            own = "" if len(versus) != 4 else better(versus.pop(0))
            told_better = cells([own, *map(better, versus)]) if versus else ""
            each = ", ".join(f"{100 * one:.1f}" for one in row["each"])
            taught = names.get(row["label"], f"({row['label']})")
            lines.append(f"| {asked} | {taught} | {percent(row['accuracy'])} | {each} |{told_better}")
            asked = ""
    return "\n".join(lines) + "\n"


def sizes() -> str:
    """Fits on pictures of other sizes than they were made with (benchmarks/learned/transfer.py)."""
    told = json.loads((LEARNED / "transfer.json").read_text(encoding="utf-8"))
    lines = table("| pixels | tokens | counted | untouched | fitted at 96, right, % | than ", BESIDE)
    for part in told["on_sizes"]:
        row = part["rows"][0]
        whole, found = percent(part["untouched"]["accuracy"]), percent(row["accuracy"])
        start = f"| {part['side']} | {part['tokens']:.0f} | {', '.join(part['tasks'])} | {whole} | {found} |"
        lines.append(start + cells(map(better, row["versus"])))
    return "\n".join(lines) + "\n"


def compared() -> Any:
    """What compare.py has written."""
    return json.loads((LEARNED / "compare.json").read_text(encoding="utf-8"))


def table(head: str, beside: Sequence[str]) -> list[str]:
    """Head and rule of a table whose last columns are differences."""
    line = head + " | than ".join(beside) + " |"
    return [line, "|---" * (line.count("|") - 1) + "|"]


def learned(row: dict[str, Any]) -> str:
    """The first cells of a learned recipe."""
    return f"| **`{row['recipe']}`** | {percent(row['accuracy'])} | {row['average']:.1f} |"


def cells(texts: Iterable[str]) -> str:
    return "".join(f" {text} |" for text in texts)


def better(other: dict[str, Any]) -> str:
    """A difference in points with its interval, in bold where it stays clear of 0 after Holm's correction."""
    value, low, high = (100 * other["difference"][key] for key in ("value", "low", "high"))
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if other["p_holm"] < CLEAR else text


def percent(estimate: dict[str, float]) -> str:
    """An estimate in per cent, with its 95 % interval."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
