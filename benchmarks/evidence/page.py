"""Write docs/evidence.md, its pictures, and docs/evidence-grid.md from the committed results.

python benchmarks/evidence/page.py
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np
import pictures
import verdict

from tokenprune.study.evaluate import difference

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
METHODS = HERE.parent / "methods"
PLAN = HERE / "plan.md"
EQUAL = {"average": ("scenes.json", (0.5, 0.25)), "flops": ("flops.json", (0.65, 0.5))}
BESIDE = ("smaller-image", "random", "uniform", "last", "era", "diverse-merge")
AGAINST = ("uniform", "diverse-merge")
WORDS = {True: "yes", False: "no", None: "not judged"}


def results() -> list[dict[str, Any]]:
    """Results of all models that were run, in the order of plan.md."""
    found = [HERE / "results" / f"{name}.json" for name in verdict.MODELS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def models(found: list[dict[str, Any]]) -> str:
    tasks = list(found[0]["whole"][0]["tasks"])
    head = ["model", "text phase", "position ids", "seed", "steps", *tasks]
    body = [
        [
            each["name"],
            each["training"]["lags"],
            each["training"]["positions"],
            str(each["training"]["seed"]),
            str(sum(each["training"]["steps"].values())),
        ]
        + [percent(each["whole"][0]["tasks"][task]["accuracy"]["value"]) for task in tasks]
        for each in found
    ]
    return table(head, body)


def verdicts(seeds: list[dict[str, Any]]) -> str:
    """Every prediction, whether it holds on each seed, by how much, and the rule that says so, in the plan's words."""
    judged, rules = [verdict.findings(each) for each in seeds], planned()
    body = [
        [name, text, *(effect(findings[name][1]) for findings in judged), rules[name]]
        for name, (text, _) in verdict.RULES.items()
    ]
    return table(["", "prediction", *(each["name"] for each in seeds), "holds if"], body)


def effect(finding: verdict.Finding) -> str:
    """Whether a prediction holds, over its numbers; their intervals stand in the table of numbers."""
    numbers = re.sub(r" \[[^]]*\]", "", finding.numbers)
    return f"{WORDS[finding.holds]}<br>{numbers}"


def planned() -> dict[str, str]:
    """The rule of each prediction: the last column of the plan's tables, so that no word differs from it."""
    rows = re.findall(r"^\| (\w+) \|.* \| (.+) \|$", PLAN.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def numbers(found: list[dict[str, Any]]) -> str:
    """The numbers behind each verdict; rules of several models stand together."""
    judged = {each["name"]: verdict.findings(each) for each in found}
    body = []
    for name in dict.fromkeys(name for findings in judged.values() for name in findings):
        for model, findings in judged.items():
            if name in findings:
                text, finding = findings[name]
                body.append([name, text, model, WORDS[finding.holds], finding.numbers])
    return table(["", "prediction", "model", "holds", "numbers"], body)


def biases(found: list[dict[str, Any]]) -> str:
    body = []
    for each in found:
        for layer in grid.LAYERS:
            line = [each["name"], str(layer)]
            for criterion in ("attention", "attention-vision", "no-rope"):
                for task in ("localisation", "ground"):
                    index = verdict.bias(each, criterion, layer, task)
                    line.append(f"{index['value']:+.2f} [{index['low']:+.2f}, {index['high']:+.2f}]")
            body.append(line)
    columns = [f"{c}, {t}" for c in ("attention", "attention-vision", "no-rope") for t in ("localisation", "ground")]
    return table(["model", "K", *columns], body)


def localisation(each: dict[str, Any]) -> str:
    budget = str(grid.Budget("keep", grid.MAIN_COUNT))
    names = list(grid.criteria(grid.MAIN_COUNT))
    body = []
    for layer in grid.LAYERS:
        cells = [verdict.task_accuracy(each, f"{name}.{layer}", "localisation", budget) for name in names]
        body.append([str(layer), *(percent(cell) for cell in cells)])
    return table(["K", *names], body)


def thirds(each: dict[str, Any]) -> str:
    chosen = ("attention", "attention-vision", "no-rope", "no-rope+grid", "uniform")
    body = [["untouched", "", *(percent(share) for share in each["thirds"]["untouched"]["thirds"])]]
    for layer in grid.EARLY:
        shares = {name: each["thirds"][f"{name}.{layer}"]["thirds"] for name in chosen}
        body += [[name, str(layer), *map(percent, share)] for name, share in shares.items()]
    return table(["criterion", "K", "top", "middle", "bottom"], body)


def blind(each: dict[str, Any]) -> str:
    """Blind tests and the oracle, with the untouched model and the pruned ones that they compare with."""
    budget = str(grid.Budget("keep", grid.MAIN_COUNT))
    rows = {"untouched": "", **{f"attention.{layer}": budget for layer in grid.EARLY}}
    body = [
        [name, *(percent(verdict.task_accuracy(each, name, task, at)) for task in grid.GRID_TASKS)]
        for name, at in rows.items()
    ]
    for name, tasks in each["blind"].items():
        body.append([name, *(percent(tasks[task]["value"]) if task in tasks else "" for task in grid.GRID_TASKS)])
    return table(["", *grid.GRID_TASKS], body)


def whole(each: dict[str, Any]) -> str:
    head = ["recipe", "budget", "tokens, mean over layers", "localisation", "tasks past the gate", "to untouched"]
    body = []
    for row in each["whole"]:
        change = row["difference"]
        moved = f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
        place = row["tasks"]["localisation"]["accuracy"]["value"]
        cells = [f"{row['average']:.1f}", percent(place), percent(row["accuracy"]["value"]), moved]
        body.append([row["condition"], row["budget"] or "-", *cells])
    return table(head, body)


def equal_cost() -> str:
    """Whole recipes at equal average and at equal multiply-adds: what stands on the page of methods, for those of this
    one, baselines, and the two that answer most there."""
    head = ["recipe", "budget", "tokens, mean over layers", "localisation", "tasks past the gate"]
    body = []
    for kind, (file, shares) in EQUAL.items():
        rows = json.loads((METHODS / file).read_text(encoding="utf-8"))["report"]
        clusters = rows["untouched 1.0"]["clusters"]
        for share in shares:
            here = [rows[f"{name} {share}"] for name in (*grid.WHOLE, *BESIDE) if f"{name} {share}" in rows]
            beside = [rows[f"{name} {share}"] for name in AGAINST]
            for row in sorted(here, key=lambda row: -row.get("accuracy", [0.0])[0]):
                cells = [row["recipe"], f"{kind}: {share}"]
                if "right" not in row:
                    body.append([*cells, "cannot get so low", *["–"] * (2 + len(beside))])
                    continue
                cells += [f"{row['average']:.1f}", percent(row["tasks"]["localisation"]), percent(row["accuracy"][0])]
                for other in beside:
                    moved = difference(np.array(row["right"]), np.array(other["right"]), clusters)
                    told = f"{100 * moved.value:+.1f} [{100 * moved.low:+.1f}, {100 * moved.high:+.1f}]"
                    cells.append("–" if other is row else told)
                body.append(cells)
    return table([*head, *(f"to {name}" for name in AGAINST)], body)


def recency(found: list[dict[str, Any]]) -> str:
    names = list(found[0]["recency"][0])
    body = [
        [each["name"], str(layer), *(f"{share[name]:.2f}" for name in names)]
        for each in found
        for layer, share in enumerate(each["recency"])
    ]
    return table(["model", "layer", *(f"distance {name}" for name in names)], body)


def every_cell(each: dict[str, Any]) -> str:
    tasks = list(each["grid"][0]["tasks"])
    body = []
    for row in each["grid"]:
        cells = []
        for task in tasks:
            a = row["tasks"][task]["accuracy"]
            cells.append(f"{percent(a['value'])} [{percent(a['low'])}, {percent(a['high'])}]")
        body.append([row["condition"], row["budget"] or "-", str(row["draws"]), *cells])
    return table(["criterion.K", "budget", "draws", *tasks], body)


def evidence(found: list[dict[str, Any]]) -> str:
    """The page: models, verdicts, then the numbers behind them."""
    gridded = [each for each in found if each["grid"]]
    controls = [each for each in found if each["name"] in verdict.CONTROLS]
    shipped = found[0]
    missing = ", ".join(f"`{name}`" for name in verdict.MODELS if name not in {each["name"] for each in found})
    template = (HERE / "evidence.template.md").read_text(encoding="utf-8")
    return template.format(
        scenes=shipped["scenes"],
        audited=grid.AUDITED,
        outcome=verdict.outcome(gridded),
        missing=f"Not finished when this page was made: {missing}." if missing else "",
        models=models(found),
        verdicts=verdicts(gridded),
        controls=numbers(controls),
        numbers_indented=textwrap.indent(numbers(gridded), "    "),
        biases=biases(found),
        localisation="\n".join(f"`{each['name']}`:\n\n{localisation(each)}" for each in gridded),
        blind="\n".join(f"`{each['name']}`:\n\n{blind(each)}" for each in gridded),
        thirds="\n".join(f"`{each['name']}`:\n\n{thirds(each)}" for each in gridded),
        whole=equal_cost(),
        recency_indented=textwrap.indent(recency(found), "    "),
    )


def cells(found: list[dict[str, Any]]) -> str:
    """The page with every cell of the grid."""
    found = [each for each in found if each["grid"]]
    parts = ["# Evidence: every cell\n"]
    parts.append(
        "Accuracy in % with 95 % intervals, as in [Evidence](evidence.md). Written by "
        "`benchmarks/evidence/page.py` from the committed results; nothing is left out.\n"
    )
    parts += [f"## {each['name']}\n\n{every_cell(each)}" for each in found]
    parts += [f"## {each['name']}, whole recipes\n\n{whole(each)}" for each in found]
    return "\n".join(parts)


def write() -> None:
    found = results()
    (DOCS / "evidence.md").write_text(evidence(found), encoding="utf-8")
    (DOCS / "evidence-grid.md").write_text(cells(found), encoding="utf-8")
    gridded = [each for each in found if each["grid"]]
    pictures.rows_kept(gridded).savefig(DOCS / "images" / "evidence-rows.png")
    trained_alike = [each for each in found if each["name"] == "seed-0" or each["name"].endswith(verdict.FULL)]
    pictures.rows_kept(trained_alike, ("attention",)).savefig(DOCS / "images" / "evidence-controls.png")
    pictures.accuracy_by_count(found).savefig(DOCS / "images" / "evidence-localisation.png")


if __name__ == "__main__":
    write()
