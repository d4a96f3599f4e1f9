"""Writes the tables of recipes and parts into docs: python scripts/tables.py [--check]

The text comes from the recipes and the registry, the numbers from the solver. Each table stands between two comments
that name it, and tests/test_docs.py runs the check, so that no page forgets a recipe or a part.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml
from learned_tables import looking, own_counts, shipped, sizes, transfer

from tokenprune import ledger
from tokenprune.budget import survivors
from tokenprune.builder import build
from tokenprune.recipe import Recipe, list_learned_recipes, list_recipes, load_recipe, recipe_path
from tokenprune.recipe.part_models import PartSpec
from tokenprune.recipe.schema import StageSpec
from tokenprune.registry import ROLES, parts
from tokenprune.study.evaluate import difference

ROOT = Path(__file__).parent.parent
TOTAL, GRID, DEPTH = 576, (1, 24, 24), 32
ANSWERS = ROOT / "benchmarks" / "methods"
TIMES = ROOT / "benchmarks" / "performance" / "methods.json"
LOAD = ROOT / "benchmarks" / "serving" / "load.json"
WORK = {
    "run": "`run --images`, 150 questions",
    "eval": "`eval`, 16 scenes",
    "tune": "`tune`, 16 scenes",
    "longer": "`eval`, 100 scenes",
}
WORKERS = LOAD.with_name("workers.json")
PUBLISHED = ROOT / "scripts" / "published.yaml"
MODEL, MANY, SHARE = "llava-1.5-7b", 2880, 0.25
"""What own costs are told for: a decoder, vision tokens, and the share of them that recipes keep."""
UNBUDGETED = {"none", "vtw"}
"""Recipes that a budget does not change."""
START, END = "<!-- generated: {} -->\n", "<!-- end of {} -->"


def paper(recipe: Recipe) -> str:
    """A link to the recipe's paper, empty where it has none."""
    if recipe.paper is None:
        return ""
    number = recipe.paper.removeprefix("arXiv:")
    return f"[arXiv:{number}](https://arxiv.org/abs/{number})" if number != recipe.paper else recipe.paper


def anchor(name: str) -> str:
    """The anchor that headings of this name get on the pages."""
    return name.replace(".", "")


def is_baseline(name: str) -> bool:
    return recipe_path(name).parent.name == "baselines"


def title(name: str) -> str:
    """The recipe's name in a table."""
    return f"`{name}`" + (" (baseline)" if is_baseline(name) else "")


def places(recipe: Recipe, only: StageSpec | None = None) -> str:
    """The places of the recipe's stages, or of `only` one, as shares of the depth."""
    stages = recipe.stages if only is None else (only,)
    names = [str(stage.place).removeprefix("before_layer: ").replace("_", " ") for stage in stages]
    return ", ".join(names) or "none"


def costs(name: str, variant: str | None = None) -> tuple[str, str]:
    """Tokens after each stage, and entering a layer on average; a dash where the picture decides."""
    pipeline = build(load_recipe(name, variant=variant), depth=DEPTH)
    planned = pipeline.plan(TOTAL, [GRID])
    counts = [count for count in planned if count is not None]
    if len(counts) < len(planned):
        return "the picture decides", "–"
    after = survivors(pipeline.steps(), counts, TOTAL)
    return ", ".join(map(str, after)) or str(TOTAL), f"{pipeline.summary(TOTAL, [GRID]).average:.4g}"


def table() -> str:
    """A row for each recipe: name, summary, paper, places, variants."""
    lines = [
        "| recipe | what it does | paper | stages before layer | variants |",
        "|---|---|---|---|---|",
    ]
    for name in list_recipes():
        recipe = load_recipe(name)
        variants = ", ".join(f"`{variant}`" for variant in recipe.variants)
        link = f"[{title(name)}](#{anchor(name)})"
        lines.append(f"| {link} | {recipe.summary} | {paper(recipe)} | {places(recipe)} | {variants} |")
    return "\n".join(lines) + "\n"


def sections() -> str:
    """A section for each recipe."""
    return "\n".join(section(name) for name in [*list_recipes(), *list_learned_recipes()])


def section(name: str) -> str:
    """What a recipe does, when to use it, its differences from the paper, and what each setting costs."""
    recipe = load_recipe(name)
    lines = [f"### {name}", "", f"{recipe.summary}. {usage(name)}".strip(), ""]
    if recipe.differences:
        lines += [f"- {' '.join(text.split())}" for text in recipe.differences]
        lines.append("")
    elif recipe.paper:
        lines += ["No known difference from the paper.", ""]
    lines += ["| setting | vision tokens after each stage | average over the layers |", "|---|---|---|"]
    rows = [("as it is", None), *((f"variant `{variant}`", variant) for variant in recipe.variants)]
    for setting, variant in rows:
        after, average = costs(name, variant)
        lines.append(f"| {setting} | {after} | {average} |")
    return "\n".join([*lines, ""])


def usage(name: str) -> str:
    """The `When:` sentence of the recipe's head."""
    head = recipe_path(name).read_text(encoding="utf-8").partition("version:")[0]
    comment = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    found = re.search(r"When: (.*?) (Make|Try): ", comment)
    if found is None:
        return ""
    text = re.sub(r"\s+", " ", found[1]).strip()
    return f"**When**: {text}"


def keys() -> str:
    """A row for each key of a stage: default, and what to choose from."""
    (stage,) = load_recipe({"version": 1, "stages": [{"place": "after_vision"}]}, keep=1.0).stages
    lines = [
        "| key of a stage | default | choose from |",
        "|---|---|---|",
        "| `place` | – | `after_vision`; `{before_layer: L}`, L counts from 0, or is a share: `25%`, `3/32` |",
    ]
    for role in ROLES:
        default: PartSpec | None = getattr(stage, role)
        own = [f"`{name}`" for name, part in parts(role).items() if part.__module__.startswith("tokenprune.")]
        lines.append(f"| `{role}` | {f'`{default.type}`' if default else 'none'} | {', '.join(own)} |")
    lines.append("| `positions` | `original` | `original`, `renumber` |")
    lines.append("| `kv` | `later_layers` | `later_layers`; `all_layers`: dropped tokens leave earlier caches, too |")
    skip = "`skip_ffn`: dropped tokens stay for vision tokens to see, and skip the feed-forward"
    lines.append(f"| `dropped` | `leave` | `leave`; {skip} |")
    return "\n".join(lines) + "\n"


def methods() -> str:
    """A row for each recipe that runs on any model."""
    return rows(list_recipes(), json.loads(TIMES.read_text())["recipes"])


def learned() -> str:
    """A row for each recipe that is fitted to a model first."""
    return rows(list_learned_recipes())


def rows(names: Sequence[str], times: dict[str, Any] | None = None) -> str:
    """A row for each recipe: paper, place, parts and own cost of its stages, and own time where that is measured."""
    lines = [
        "| recipe | paper | stages: place, parts that decide | own cost |" + (" own time |" if times else ""),
        "|---|---|---|---|" + ("---|" if times else ""),
    ]
    for name in names:
        recipe = load_recipe(name)
        stages = "<br>".join(f"{places(recipe, stage)}: {deciding(stage)}" for stage in recipe.stages) or "none"
        line = f"| [`{name}`](recipes.md#{anchor(name)}) | {paper(recipe)} | {stages} | {own_cost(name)} |"
        lines.append(line + (f" {small_share(times[name]['share']) if name in times else 'none'} |" if times else ""))
    return "\n".join(lines) + "\n"


def scenes() -> str:
    """A row for each recipe that was asked about scenes, at equal averages."""
    return on_scenes(ANSWERS / "scenes.json", (0.5, 0.25, 0.11), "of the tokens", 0.25)


def flops() -> str:
    """A row for each recipe that was asked about scenes, at equal multiply-adds of the whole prefill."""
    return on_scenes(ANSWERS / "flops.json", (0.65, 0.5, 0.4), "of the multiply-adds", 0.5)


def on_scenes(path: Path, budgets: Sequence[float], of: str, middle: float) -> str:
    """A row for each recipe, best at the `middle` budget first: right answers at each budget, and there how many more
    than the untouched model, `uniform` and `diverse-merge`, question by question."""
    rows: dict[str, dict[float, Any]] = {}
    for row in json.loads(path.read_text())["report"].values():
        rows.setdefault(row["recipe"], {})[row["budget"]] = row
    untouched = rows.pop("untouched")[1.0]
    clusters = untouched["clusters"]
    beside = [("untouched", untouched), *((f"`{name}`", rows[name][middle]) for name in ("uniform", "diverse-merge"))]
    lines = [
        f"{len(untouched['right'])} questions about {len(set(clusters))} scenes; untouched {accuracy(untouched)}. "
        f"Differences are at {middle:.0%}, paired.",
        "",
        "| recipe | "
        + " | ".join(f"{share:.0%} {of}" for share in budgets)
        + " | tokens | "
        + " | ".join(f"to {name}" for name, _ in beside)
        + " |",
        "|" + (len(budgets) + 2 + len(beside)) * "---|",
    ]
    for name in sorted(rows, key=lambda name: -rows[name].get(middle, {}).get("accuracy", [-1.0])[0]):
        own = rows[name]
        told = [accuracy(own[share]) if "right" in own.get(share, {}) else "–" for share in budgets]
        at = own.get(middle, {})
        told.append(f"{at['average']:.1f}" if "right" in at else "–")
        for _, other in beside:
            told.append(more(at, other, clusters) if "right" in at and at is not other else "–")
        label = "a smaller image" if name == "smaller-image" else f"`{name}`"
        lines.append(f"| {label} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def more(row: dict[str, Any], other: dict[str, Any], clusters: Sequence[int]) -> str:
    """How many more of a hundred questions are answered right, and the 95 % interval of that."""
    found = difference(np.array(row["right"]), np.array(other["right"]), clusters)
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def accuracy(row: dict[str, Any]) -> str:
    """Right answers in per cent, and their 95 % interval."""
    value, low, high = (100 * each for each in row["accuracy"])
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def published() -> str:
    """A row for each published setting: what its name promises, and what it costs."""
    lines = [
        "| published as | recipe | in a layer, average | in the last layer | decoder FLOPs | prefill FLOPs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for setting in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        name, _, variant = setting["recipe"].partition(":")
        keep = setting.get("keep")
        told = ledger(MODEL, load_recipe(name, variant=variant or None, keep=keep), text=64)
        vision = [layer.vision for layer in told.reduced.rows]
        about = "" if told.exact else "≈ "
        numbers = f"{about}{fmean(vision):.1f} | {about}{vision[-1]}"
        shares = f"{about}{told.share('papers'):.1%} | {about}{told.share('prefill'):.1%}".replace("%", " %")
        budget = "" if keep is None else f" `keep: {keep}`"
        lines.append(f"| {setting['called']} | `{setting['recipe']}`{budget} | {numbers} | {shares} |")
    return "\n".join(lines) + "\n"


def load() -> str:
    """A row for each side of the load benchmark, by load."""
    models = json.loads(LOAD.read_text(encoding="utf-8"))["models"]
    lines = [
        "| model | load | side | requests/s | times untouched | first token p50, p99 | KV blocks | cached tokens "
        "| tower, choosing |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, told in models.items():
        for name, sides in told["summary"].items():
            for side, row in sides.items():
                low, high = row["times_untouched_range"]
                speed = "" if side == "untouched" else f"{row['times_untouched']:.2f} ({low:.2f}–{high:.2f})"
                first = f"{1000 * row['first_token_p50']:.0f}, {1000 * row['first_token_p99']:.0f} ms"
                shares = f"{row['tower']:.0%}, {row['choosing']:.0%}".replace("%", " %")
                numbers = f"{row['requests_per_second']:.2f} | {speed} | {first} | {row['peak_blocks']}"
                cached = f"{row['from_cache']:.0f}" if row["from_cache"] else "–"
                lines.append(f"| {model} | {name} | `{side}` | {numbers} | {cached} | {shares} |")
    return "\n".join(lines) + "\n"


def workers() -> str:
    """A row for each command, one process and others: seconds by the clock, the median over rounds."""
    told = json.loads(WORKERS.read_text(encoding="utf-8"))["commands"]
    ways = list(dict.fromkeys(way for each in told.values() for way in each["runs"]))
    lines = [f"| command | {' | '.join(ways)} |", "|---|" + "---:|" * len(ways)]
    for name, each in told.items():
        runs = [[run["command"] for run in each["runs"].get(way, [])] for way in ways]
        seconds = (f"{median(times):.1f} s" if times else "–" for times in runs)
        lines.append(f"| {WORK[name]} | {' | '.join(seconds)} |")
    return "\n".join(lines) + "\n"


def deciding(stage: StageSpec) -> str:
    """The parts of a stage that are not the plainest of their role."""
    plain = {"constant", "top_k", "drop", "solved", "fixed", "pyramid", "table"}
    used = [f"`{part.type}`" for part in stage.parts.values() if part.type not in plain]
    return ", ".join(used) or "nothing is kept"


def own_cost(name: str) -> str:
    """Multiply-adds of the recipe's own parts, as a share of the prefill that it leaves, under the common budget."""
    plan = load_recipe(name, keep=None if name in UNBUDGETED else SHARE)
    told = ledger(MODEL, plan, tokens=MANY, text=64).reduced
    return small_share(sum(stage.total for stage in told.stages) / told.prefill)


def small_share(share: float) -> str:
    """``0.54 %``, and what is less than a hundredth of that as such."""
    return "none" if not share else "< 0.01 %" if share < 1e-4 else f"{share:.2%}".replace("%", " %")


PAGES = {
    ROOT / "docs" / "recipes.md": {"table": table, "sections": sections},
    ROOT / "docs" / "write-a-recipe.md": {"keys": keys},
    ROOT / "docs" / "serving.md": {"load": load, "workers": workers},
    ROOT / "docs" / "methods.md": {
        "methods": methods,
        "learned": learned,
        "published": published,
        "scenes": scenes,
        "flops": flops,
    },
    ROOT / "docs" / "learned.md": {
        "shipped": shipped,
        "own-counts": own_counts,
        "looking": looking,
        "transfer": transfer,
        "sizes": sizes,
    },
}
"""Page -> name of each generated part and what makes it."""


def written(page: Path) -> str:
    """Text of `page` with its generated parts as they should be."""
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        start, end = START.format(name), END.format(name)
        before, found, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise SystemExit(f"{page}: expected a line {start.strip()!r} and after it a line {end!r}")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


def main(arguments: list[str]) -> None:
    """Write the pages; with `--check` only say which are out of date, and fail if any is."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(f"expected nothing or --check, got {' '.join(arguments)!r}")
    stale = [page for page in PAGES if written(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if not arguments:
            page.write_text(written(page), encoding="utf-8")
        print("out of date:" if arguments else "wrote", page.relative_to(ROOT))
    if stale and arguments:
        raise SystemExit("run: python scripts/tables.py")


if __name__ == "__main__":
    main(sys.argv[1:])
