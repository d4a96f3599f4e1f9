"""Writes the generated parts of docs/recipes.md, the table and a section a recipe: python scripts/recipes_page.py

The text comes from the recipes, the numbers from the solver; tests/test_docs.py asks for a run after a change.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenprune.budget import survivors
from tokenprune.builder import build
from tokenprune.recipe import Recipe, list_recipes, load_recipe, recipe_path

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
TOTAL, GRID, DEPTH = 576, (1, 24, 24), 32
START, END = "<!-- generated: {} -->\n", "<!-- end of {} -->"


def paper(recipe: Recipe) -> str:
    if recipe.paper is None:
        return ""
    number = recipe.paper.removeprefix("arXiv:")
    return f"[arXiv:{number}](https://arxiv.org/abs/{number})" if number != recipe.paper else recipe.paper


def is_baseline(name: str) -> bool:
    return recipe_path(name).parent.name == "baselines"


def places(recipe: Recipe) -> str:
    names = [str(stage.place).removeprefix("before_layer: ").replace("_", " ") for stage in recipe.stages]
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
    lines = [
        "| recipe | what it does | paper | stages before layer | variants |",
        "|---|---|---|---|---|",
    ]
    for name in list_recipes():
        recipe = load_recipe(name)
        title = f"`{name}`" + (" (baseline)" if is_baseline(name) else "")
        variants = ", ".join(f"`{variant}`" for variant in recipe.variants)
        link = f"[{title}](#{name.replace('.', '')})"
        lines.append(f"| {link} | {recipe.summary} | {paper(recipe)} | {places(recipe)} | {variants} |")
    return "\n".join(lines) + "\n"


def sections() -> str:
    return "\n".join(section(name) for name in list_recipes())


def section(name: str) -> str:
    recipe = load_recipe(name)
    lines = [f"### {name}", "", f"{recipe.summary}. {usage(name)}".strip(), ""]
    if recipe.differences:
        lines += [f"- {' '.join(text.split())}" for text in recipe.differences]
        lines.append("")
    elif recipe.paper:
        lines += ["No known difference from the paper.", ""]
    lines += ["| setting | vision tokens after each stage | average over the layers |", "|---|---|---|"]
    rows = [("as it is", None), *((f"variant `{variant}`", variant) for variant in recipe.variants)]
    for title, variant in rows:
        after, average = costs(name, variant)
        lines.append(f"| {title} | {after} | {average} |")
    return "\n".join([*lines, ""])


def usage(name: str) -> str:
    """The `When:` sentence of the recipe's head."""
    head = recipe_path(name).read_text(encoding="utf-8").partition("version:")[0]
    comment = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    found = re.search(r"When: (.*?) Try: ", comment)
    if found is None:
        return ""
    text = re.sub(r"\s+", " ", found[1]).strip()
    return f"**When**: {text}"


def generated() -> dict[str, str]:
    return {"table": table(), "sections": sections()}


def written() -> str:
    """The page with its generated parts as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in generated().items():
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
