"""Writes the tables of docs/performance.md: python scripts/performance_page.py

They are made of the results in benchmarks/performance; tests/test_docs.py asks for a run after a change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "performance"
START, END = "<!-- generated: {} -->\n", "<!-- end of {} -->"


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def faster(row: dict[str, Any], phase: str = "prefill") -> str:
    speed = row["speedup"][phase]
    if speed is None:
        return "–"
    return f"{speed['value']:.2f} ({speed['low']:.2f} … {speed['high']:.2f})"


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
        f"{machine(found)}; {settings['parameters'] / 1e6:.0f} M parameters, {settings['rounds']} rounds.",
        "",
        *targets(found["cells"]),
        "",
        "| recipe | pictures | weights | run | vision tokens | prefill faster | ceiling | reached | machine allows "
        "| reached | method |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lengths = (read("lengths") or {"batches": {}})["batches"]
    for cell, kept in found["cells"].items():
        weights, how, batch, name = cell.split("/")
        if "skipped" in kept:
            lines.append(f"| `{name}` | {batch} | {weights} | {how} | | {kept['skipped']} | | | | | |")
        for row in kept.get("rows", [])[1:]:
            # What an untouched layer takes at each length was measured eager.
            possible = lengths.get(f"{weights}/{batch}", {"possible": {}})["possible"] if how == "eager" else {}
            most = possible.get(f"{name}/{row['name']}")
            recipe = "`sparsevlm-v1.5`, `keep: 1.0`" if name == "keep 1.0" else f"`{name}`, `keep: {row['name']}`"
            numbers = f"{faster(row)} | {row['ceiling']['prefill']:.2f} | {row['reached']['prefill']:.2f}"
            allowed = "– | –" if most is None else f"{most:.2f} | {row['speedup']['prefill']['value'] / most:.2f}"
            where = f"{batch} | {weights} | {how} | {row['tokens']:.4g}"
            lines.append(f"| {recipe} | {where} | {numbers} | {allowed} | {method(row)} |")
    return "\n".join(lines) + "\n"


def targets(cells: dict[str, Any]) -> list[str]:
    """How many rows reach 0.95 of the ceiling, by weights, run and number of pictures."""
    reached: dict[tuple[str, str, str], list[float]] = {}
    for cell, kept in cells.items():
        weights, how, batch, name = cell.split("/")
        if name != "keep 1.0":
            rows = kept.get("rows", [])[1:]
            reached.setdefault((weights, how, batch), []).extend(row["reached"]["prefill"] for row in rows)
    lines = ["| weights | run | pictures | rows at 0.95 or more | lowest |", "|---|---|---|---|---|"]
    for (weights, how, batch), shares in reached.items():
        met = sum(share >= 0.95 for share in shares)
        lines.append(f"| {weights} | {how} | {batch} | {met} of {len(shares)} | {min(shares, default=0):.2f} |")
    return lines


def method(row: Any) -> str:
    """Share of the method; a compiled prefill has no clock inside."""
    return "unknown" if row["method_share"] is None else f"{row['method_share']:.1%}"


def gpu() -> str:
    found = read("gpu")
    if found is None:
        return "Not measured yet.\n"
    lines = [
        f"{machine(found)}.",
        "",
        "| model | vision tokens | batch | run | recipe | prefill faster | reached | without tower: faster | reached "
        "| method | decode faster | KV cache |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, kept in found["cells"].items():
        where = " | ".join(cell.split("/"))
        if "skipped" in kept:
            lines.append(f"| {where} | {kept['skipped']} | | | | | | | |")
        for row in kept.get("rows", [])[1:]:
            numbers = f"{faster(row)} | {row['reached']['prefill']:.2f} | {faster(row, 'language')}"
            more = f"{row['reached']['language']:.2f} | {method(row)} | {faster(row, 'decode')}"
            lines.append(f"| {where} | `{row['name']}` | {numbers} | {more} | {row['kv_share']:.1%} |")
    return "\n".join(lines) + "\n"


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
