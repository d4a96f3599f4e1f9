"""The last lines of commands: what somebody came for, no stronger than the interval, at 80 columns and at any other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tokenprune as tp
from tokenprune.cli import audit, bench, check, doctor, evaluate, fit, flops, ls, new, run, schema, table, tune
from tokenprune.cli import show as show_recipe
from tokenprune.cli.bench_table import show
from tokenprune.cli.verdicts import evaluated, speed
from tokenprune.study.bench import Bench, SideRow
from tokenprune.study.bench.clock import Sample
from tokenprune.study.statistics import Estimate


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (1.1, 1.4, "prefill 1.20× as fast (95 %: 1.10–1.40, paired by round)"),
        (0.7, 0.9, "prefill 1.20× as fast, which is slower (95 %: 0.70–0.90, paired by round)"),
        (0.9, 1.4, "prefill: no difference beyond this run's noise (0.90–1.40× as fast)"),
        (None, None, "prefill 1.20× as fast, in too few runs to tell that from noise"),
    ],
)
def test_a_speed_up_is_one_only_where_its_interval_says_so(low: float | None, high: float | None, told: str) -> None:
    assert speed("prefill", 1.2, low, high) == told


def result(change: tuple[float, float, float], first: str = "a", measure: str = "accuracy", pictures: int = 8) -> Any:
    def row(label: str, value: float, budget: str = "keep: 0.5", baseline: bool = False) -> Any:
        return SimpleNamespace(label=label, budget=budget, baseline=baseline, overall=Estimate(value, 0, 1))

    rows = [
        row("untouched", 0.9, ""),
        row("random", 0.6, baseline=True),
        row("a", 0.8),
        row("last", 0.5, baseline=True),
    ]
    second = "random" if first == "a" else "a"
    pair = SimpleNamespace(budget="keep: 0.5", first=first, second=second, change=Estimate(*change))
    cases = [SimpleNamespace(picture_id=number) for number in range(pictures)]
    return SimpleNamespace(rows=rows, measure=measure, pairs=[pair], cases=cases)


def test_the_best_recipe_stands_beside_the_best_baseline() -> None:
    (line,) = evaluated(result((0.2, 0.1, 0.3)))
    assert line == ("keep: 0.5: a, 80.0 % right (untouched 90.0 %); +20.0 points (95 %: +10.0…+30.0) against random")
    assert evaluated(result((-0.2, -0.3, -0.1), first="random")) == [line]
    assert evaluated(result((0.02, -0.1, 0.1)))[0].endswith("; not told apart from random")
    assert evaluated(result((0.2, 0.2, 0.2), pictures=7))[0].endswith("; too few pictures to tell it apart from random")
    several = result((0.2, 0.1, 0.3))
    several.rows.append(SimpleNamespace(label="b", budget="keep: 0.5", baseline=False, overall=Estimate(0.7, 0, 1)))
    assert evaluated(several)[0].startswith("best of 2 recipes at keep: 0.5: a, 80.0 % right")
    (same,) = evaluated(result((0.2, 0.1, 0.3), measure="agreement"))
    assert "80.0 % the same; +20.0" in same


MODULES = (audit, bench, check, doctor, evaluate, fit, flops, ls, new, run, schema, show_recipe, table, tune)
NUMBERS = re.compile(r"\d+(\.\d+)? ?([GMTk]|ms|%|×|MiB)\b")


@pytest.mark.parametrize(
    "command",
    [
        ("flops", "sparsevlm"),
        ("flops", "diverse-merge", "--keep", "0.25"),
        ("show", "diverse-merge"),
        ("show", "sparsevlm-v1.5", "--variant", "64"),
        ("ls",),
        ("ls", "parts"),
        ("ls", "models"),
    ],
)
def test_no_word_and_no_number_breaks_at_80_columns(
    command: tuple[str, ...], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands on one line of a wide screen stands whole on some line of a narrow one."""
    monkeypatch.setenv("COLUMNS", "400")
    wide = cli(*command).out
    monkeypatch.setenv("COLUMNS", "80")
    narrow = cli(*command).out
    words = set(wide.replace("│", " ").split())
    assert words <= set(narrow.split())
    for found in NUMBERS.finditer(wide):
        assert any(found[0] in line for line in narrow.splitlines()), found[0]


def test_sentences_are_wrapped_between_words(
    cli: Callable[..., Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal breaks what is too long wherever its last column is."""
    asked = ("run", picture, "how many rings are there ?", "--max-new-tokens", 1)
    scenes = ("--scenes", 2, "--task", "colour", "--seeds", 1)
    for command in (
        asked,
        ("eval", "fastv", "--keep", 0.5, *scenes),
        ("audit", "fastv", "--keep", 0.25, "--scenes", 2),
    ):
        monkeypatch.setenv("COLUMNS", "80")
        told = cli(*command).out.splitlines()
        assert max(map(len, told)) <= 80
    assert len(cli("run", picture).err.splitlines()) == 1, "a mistake is one line for whoever reads it by a program"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_examples_can_be_pasted(module: Any, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns help shows each line of an example whole, and no choice or flag of an option in two pieces."""
    monkeypatch.setenv("COLUMNS", "80")
    told = cli(module.NAME, "--help").out
    shown = [line.strip() for line in told.splitlines()]
    assert all(line.strip() in shown for line in module.EXAMPLES)
    assert "float16>" not in told and "…" not in told.partition("Examples:")[0]


def test_the_tables_of_bench_fit_long_names_and_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(prefill: float, method: float) -> tuple[Sample, ...]:
        times = (prefill, prefill * 1.3, prefill * 1.1, prefill * 0.9, prefill * 1.2)
        return tuple(Sample(prefill=time, vision=0.0, decode=1.0, method=method, peak=9 << 30) for time in times)

    ledger = tp.ledger("llava-1.5-7b", "pyramiddrop-code")
    sides = (("untouched", 0.0, 12.34), ("pyramiddrop-code", 0.123, 0.456))
    rows = [SideRow(name, 8, 288.5, samples(time, own), samples(12.34, 0.0), ledger) for name, own, time in sides]
    monkeypatch.setenv("COLUMNS", "80")
    show(Bench("m", "pyramiddrop-code", None, "f", 9, 576, 9, 4, "sdpa", False, "float32", "cpu", rows))
    told = capsys.readouterr().out
    (first, second) = [line for line in told.splitlines() if line.startswith("pyramiddrop-code ")][-2:]
    assert re.fullmatch(r"pyramiddrop-code +288.5 +502 ms +27.06× +27.06–27.06 +\S+× +\d+% +0.9%", first)
    assert re.fullmatch(r"pyramiddrop-code +\S+ s +1.00× +\S+× +\S+% +9.00 GiB", second)
    last = "batch of 8: prefill 27.06× as fast (95 %: 27.06–27.06, paired by round); its multiply-adds allow "
    assert re.search(re.escape(last) + r"\S+×$", " ".join(told.split()))
    assert max(map(len, told.splitlines()[2:])) <= 80


def test_commands_end_with_what_they_were_run_for(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = " ".join(cli("flops", "fastv", "--keep", "0.25").out.split())
    last = r"multiply-adds up to the first token: [\d.]+% of the untouched model's; with the answer: [\d.]+%$"
    assert re.search(last, told)
    assert "--variant 64" in cli("show", "sparsevlm-v1.5", "--variant", "64").out.splitlines()[-1]
    timed = cli("bench", "fastv", "--batch", 1, "--rounds", 1, "--new-tokens", 1, "--no-baselines").out
    last = (
        r"batch of 1: prefill [\d.]+× as fast, in too few runs to tell that from noise; its multiply-adds allow \S+×$"
    )
    assert re.search(last, " ".join(timed.split()))
