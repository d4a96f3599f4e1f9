"""Writes the tables of docs/performance.md: python scripts/performance_page.py

They are made of the results in benchmarks/performance; tests/test_docs.py asks for a run after a change.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "performance"
TARGET = 0.95
"""Share of the ceiling, or of a free method's speed, that the page asks for on a CPU."""
GPU_TARGET = 0.9
START, END = "<!-- generated: {} -->\n", "<!-- end of {} -->"


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def faster(row: dict[str, Any], phase: str = "prefill") -> str:
    return "–" if row["speedup"][phase] is None else interval(row["speedup"][phase])


def interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"


def machine(found: dict[str, Any]) -> str:
    here = found["machine"]
    threads = "" if "NVIDIA" in here["device"] else f", {here['threads']} threads"
    versions = f"Python {here['python']}, PyTorch {here['torch']}, transformers {here['transformers']}"
    return f"{here['device']}{threads}, {versions}"


def cpu() -> str:
    found = read("cpu")
    if found is None:
        return "Not measured yet.\n"
    settings = found["settings"]
    lines = [
        f"{machine(found)}; {settings['parameters'] / 1e6:.0f} M parameters. Rounds: {rounds(found['cells'])}.",
        "",
        *targets(found["cells"]),
        "",
        *certain(found["cells"]),
        "",
        *clocked(found["cells"]),
        "",
        *hooks(found["cells"]),
        "",
        "| recipe | pictures | weights | run | vision tokens | prefill faster | ceiling | reached | machine allows "
        "| of that | method |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, kept in found["cells"].items():
        weights, how, batch, name = cell.split("/")
        if name == "hooks":
            continue
        if "skipped" in kept:
            lines.append(f"| `{name}` | {batch} | {weights} | {how} | | {kept['skipped']} | | | | | |")
        for row in kept.get("rows", [])[1:]:
            recipe = "`sparsevlm-v1.5`, `keep: 1.0`" if name == "keep 1.0" else f"`{name}`, `keep: {row['name']}`"
            limit = row.get("machine", {}).get("prefill")
            why = "" if limit is None or verdict(row) == "met" else f", {verdict(row)}"
            numbers = f"{faster(row)} | {row['ceiling']['prefill']:.2f} | {row['reached']['prefill']:.3f}{why}"
            allowed = "– | –" if limit is None else f"{limit['allows']['value']:.2f} | {interval(limit['reached'])}"
            where = f"{batch} | {weights} | {how} | {row['tokens']:.4g}"
            lines.append(f"| {recipe} | {where} | {numbers} | {allowed} | {method(row)} |")
    return "\n".join(lines) + "\n"


def rounds(cells: dict[str, Any]) -> str:
    """How many there were of each recipe, by the number of pictures."""
    told: dict[str, dict[str, set[int]]] = {}
    for cell, kept in cells.items():
        _, _, pictures, name = cell.split("/")
        for row in kept.get("rows", [])[1:]:
            told.setdefault(f"`{name}`", {}).setdefault(pictures, set()).add(len(row["samples"]))
    return "; ".join(
        f"{name} "
        + ", ".join(
            f"{' or '.join(map(str, sorted(numbers)))} of {pictures} picture{'' if pictures == '1' else 's'}"
            for pictures, numbers in of.items()
        )
        for name, of in told.items()
    )


def verdict(row: dict[str, Any]) -> str:
    """Whether a row reaches 0.95 of the ceiling, else what keeps it from there; by medians.

    ``machine``: a method that costs nothing does not get there either. ``method``: it does, but not with the time that
    the recipe's own stages took by the clock. ``open``: neither tells.
    """
    if row["reached"]["prefill"] >= TARGET:
        return "met"
    allowed = row["machine"]["prefill"]["allows"]["value"]
    if allowed / row["ceiling"]["prefill"] < TARGET:
        return "machine"
    with_method = allowed / (1 + allowed * (row["method_share"] or 0.0))
    return "method" if with_method / row["ceiling"]["prefill"] < TARGET else "open"


def targets(cells: dict[str, Any]) -> list[str]:
    """How many rows reach 0.95 of the ceiling, what keeps the others from it, and how all are beside a free method."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell, kept in cells.items():
        weights, how, batch, name = cell.split("/")
        if name not in ("keep 1.0", "hooks"):
            groups.setdefault((weights, how, batch), []).extend(kept.get("rows", [])[1:])
    lines = [
        "| weights | run | pictures | 0.95 of the ceiling | median (lowest) | else: machine | method | open "
        "| 0.95 of a free method | median (lowest) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (weights, how, batch), rows in groups.items():
        shares = [row["reached"]["prefill"] for row in rows]
        beside = [row["machine"]["prefill"]["reached"]["value"] for row in rows]
        why = [verdict(row) for row in rows]
        rest = " | ".join(str(why.count(reason)) for reason in ("machine", "method", "open"))
        numbers = f"{met(shares)} | {middle(shares)} | {rest} | {met(beside)} | {middle(beside)}"
        lines.append(f"| {weights} | {how} | {batch} | {numbers} |")
    return lines


def certain(cells: dict[str, Any]) -> list[str]:
    """In how many of the rows that the machine keeps from 0.95 the noise leaves no doubt of it."""
    told = []
    for pictures, of in (("1", "one picture"), ("4", "four")):
        rows = [row for cell, kept in cells.items() if cell.split("/")[2] == pictures for row in kept.get("rows", [])]
        kept_off = [row for row in rows if row.get("machine") and verdict(row) == "machine"]
        sure = sum(row["machine"]["prefill"]["allows"]["high"] / row["ceiling"]["prefill"] < TARGET for row in kept_off)
        told.append(f"{sure} of the {len(kept_off)} with {of}")
    return [f"Rows of `machine` where the free method's whole interval is below {TARGET}: {', '.join(told)}."]


def clocked(cells: dict[str, Any]) -> list[str]:
    """Whether recipes take longer than a free method by more than their stages took by the clock."""
    measured = [row for kept in cells.values() for row in kept.get("rows", []) if row.get("machine")]
    rows = [row for row in measured if row["method_share"] is not None]
    if len(rows) < 2:
        return []
    longer = [1 / row["machine"]["prefill"]["reached"]["value"] - 1 for row in rows]
    stages = [row["method_share"] * row["machine"]["prefill"]["allows"]["value"] for row in rows]
    rest = [whole - part for whole, part in zip(longer, stages, strict=True)]
    width = 1.96 * stdev(rest) / len(rest) ** 0.5
    return [
        f"Over the {len(rows)} rows whose stages have a clock, a prefill takes {mean(longer):.2%} longer than that of "
        f"the free method, of which the stages take {mean(stages):.2%}; the rest is {mean(rest):.2%} ± {width:.2%} "
        "(95 % interval of the mean over rows)."
    ]


def hooks(cells: dict[str, Any]) -> list[str]:
    """What attaching costs."""
    shares = {cell.split("/")[0]: kept["rows"][0]["share"] for cell, kept in cells.items() if cell.endswith("/hooks")}
    if not shares:
        return []
    told = " and ".join(f"{share:.2%} of the prefill with {weights} weights" for weights, share in shares.items())
    return [f"Hooks of an attached recipe that keeps everything take {told}."]


def met(shares: list[float]) -> str:
    return f"{sum(share >= TARGET for share in shares)} of {len(shares)}" if shares else "–"


def middle(shares: list[float]) -> str:
    return f"{median(shares):.2f} ({min(shares):.2f})" if shares else "–"


def method(row: Any) -> str:
    """Share of the method; a compiled prefill has no clock inside."""
    return "unknown" if row["method_share"] is None else f"{row['method_share']:.1%}"


def gpu() -> str:
    found = read("gpu")
    if found is None:
        return "Not measured yet.\n"
    cells = found["cells"]
    counts = sorted({len(kept["rows"][0]["samples"]) for kept in cells.values() if "rows" in kept})
    lines = [
        f"{machine(found)}; {' or '.join(map(str, counts))} rounds.",
        "",
        *gpu_targets(cells),
        "",
        *decoding(cells),
        "",
        "| model | vision tokens | batch | run | recipe | prefill faster | reached | machine allows "
        "| without tower: faster | reached | machine allows | method | decode faster | KV cache |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, kept in cells.items():
        where = " | ".join(cell.split("/"))
        if "skipped" in kept:
            lines.append(f"| {where} | {kept['skipped']} | | | | | | | | | |")
        for row in kept.get("rows", [])[1:]:
            phases = " | ".join(
                f"{faster(row, phase)} | {row['reached'][phase]:.2f} | {free_share(row, phase)}"
                for phase in ("prefill", "language")
            )
            more = f"{method(row)} | {faster(row, 'decode')} | {row['kv_share']:.1%}"
            lines.append(f"| {where} | `{row['name']}` | {phases} | {more} |")
    return "\n".join(lines) + "\n"


def free_share(row: dict[str, Any], phase: str) -> str:
    """Share of the ceiling that a free method reaches."""
    limit = row.get("machine", {}).get(phase)
    return "–" if limit is None else f"{limit['allows']['value'] / row['ceiling'][phase]:.2f}"


def gpu_targets(cells: dict[str, Any]) -> list[str]:
    """Rows of at least 2880 vision tokens by what became of them, and the bytes of all caches."""
    lines = [
        f"| model | from 2880 tokens on | {GPU_TARGET} of the ceiling | else: machine | own time | lowest and highest "
        "| method ≤ 2 % |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell, kept in cells.items():
        model, tokens, _, _ = cell.split("/")
        if int(tokens) >= 2880:
            groups.setdefault(model, []).extend(row for row in kept.get("rows", []) if "machine" in row)
    for model, rows in groups.items():
        shares = [row["method_share"] for row in rows if row["method_share"] is not None]
        method = f"{sum(share <= 0.02 for share in shares)} of {len(shares)}"
        for phase, told in (("prefill", "whole prefill"), ("language", "without tower")):
            reached = [row["reached"][phase] for row in rows]
            missed = [row for row, share in zip(rows, reached, strict=True) if share < GPU_TARGET]
            free = [row["machine"][phase]["allows"]["value"] / row["ceiling"][phase] for row in missed]
            machine = sum(share < GPU_TARGET for share in free)
            met = f"{len(rows) - len(missed)} of {len(rows)} | {machine} | {len(missed) - machine}"
            lines.append(f"| {model} | {told} | {met} | {min(reached):.2f}, {max(reached):.2f} | {method} |")
    caches = [row["cache_bytes"] for kept in cells.values() for row in kept.get("rows", []) if "cache_bytes" in row]
    same = sum(cache["measured"] == cache["ledger"] for cache in caches)
    told = f"Bytes of the cache behind an eager prefill: as the ledger tells in {same} of {len(caches)} rows."
    return [*lines, "", told]


def decoding(cells: dict[str, Any]) -> list[str]:
    """Eager decode steps against the untouched model's: of all pairs of runs, since a cell alone has few."""
    pairs: dict[str, list[float]] = {}
    for cell, kept in cells.items():
        for row in kept.get("rows", [])[1:] if cell.endswith("/eager") else ():
            both = zip(kept["rows"][0]["samples"], row["samples"], strict=True)
            pairs.setdefault(row["name"], []).extend(before["decode"] / own["decode"] for before, own in both)
    told = ", ".join(f"`{name}` {median(ratios):.2f}" for name, ratios in pairs.items())
    number = len(next(iter(pairs.values())))
    return [f"Eager decode steps, untouched time over own: {told} (medians of {number} pairs, all cells)."]


def rank() -> str:
    found = read("rank")
    if found is None:
        return "Not measured yet.\n"
    lines = [
        f"{found['machine']}, {found['device']}, one thread, PyTorch {found['torch']}; medians of interleaved pairs.",
        "",
        "| raters × tokens | SVD, ms | Gram, ms | faster | same integer |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        same = f"{row['same']} of {row['compared']}" if row["compared"] else "not compared"
        times = f"{row['svd_ms']:.2f} | {row['gram_ms']:.2f} | {row['ratio']:.1f}"
        lines.append(f"| {row['raters']} × {row['tokens']} | {times} | {same} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in (("cpu", cpu()), ("gpu", gpu()), ("rank", rank())):
        start, end = START.format(name), END.format(name)
        before, found, rest = text.partition(start)
        after = rest.partition(end)[2]
        if not found:
            raise SystemExit(f"{PAGE}: no line {start.strip()!r}")
        text = f"{before}{start}\n{content}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
    print(PAGE)
