"""`tokenprune bench`: every way to name a model, its table and JSON, and its mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.cli.bench_table import show
from tokenprune.recipe import load_recipe
from tokenprune.study.bench import Bench, SideRow
from tokenprune.study.bench.clock import Sample

QUICK = ("--rounds", 1, "--batch", 1, "--text", 12)
SMALL = ("--model", "llava-1.5-7b", "--layers", 4, "--width", 128, *QUICK, "--new-tokens", 1)


def test_json_holds_all_sides(cli: Callable[..., Any]) -> None:
    ran = cli("bench", "fastv", "--keep", "0.25", *QUICK, "--batch", 2, "--new-tokens", 2, "--json")
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)
    names = ["untouched", "fastv", "random", "uniform", "smaller image"]
    assert [(row["name"], row["batch"]) for row in told["rows"]] == [(n, b) for b in (1, 2) for n in names]
    assert told["fingerprint"] == load_recipe("fastv", keep=0.25).fingerprint
    assert (told["budget"], told["tokens"], told["text"], told["compiled"]) == ("keep: 0.25", 144, 12, False)
    assert told["rows"][1]["speedup"]["total"]["value"] > 0
    assert told["versions"]["torch"]


def test_table_and_plot(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    file = tmp_path / "times.png"
    ran = cli("bench", "fastv", "--keep", "0.25", *SMALL, "--save-plot", file)
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("fastv, keep: 0.25 on llava-1.5-7b (4 layers, 128 wide): ")
    assert lines[1] == "cpu, float32, sdpa; 576 vision and 12 other tokens, 1 generated"
    assert "decode" not in ran.out and "peak memory" not in ran.out
    row = next(line for line in lines if line.startswith("fastv "))
    assert row.count("×") == 2 and row.split()[1] == "252"
    assert next(line for line in lines if line.startswith("untouched")).count("×") == 0
    with Image.open(file) as image:
        assert image.width > 1000


def test_tables_say_what_the_speed_up_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds 1/1, 2/4, 9/3, …: the median of the ratios is 1, the ratio of the medians is not."""

    def told(before: list[float], after: list[float]) -> str:
        def samples(times: list[float]) -> tuple[Sample, ...]:
            return tuple(Sample(prefill=t, vision=0.0, decode=0.0, method=0.0, peak=None) for t in times)

        ledger = tp.ledger("llava-1.5-7b", "fastv")
        sides = (("a", before), ("b", after))
        rows = [SideRow(name, 1, 9.0, samples(own), samples(before), ledger) for name, own in sides]
        show(Bench("m", "r", None, "f", 9, 9, 9, 1, "sdpa", False, "float32", "cpu", rows))
        return " ".join(capsys.readouterr().out.split())

    uneven, even = told([1, 2, 9, 5, 5], [1, 4, 3, 5, 6]), told([2, 4, 6, 8, 9], [1, 2, 3, 4, 4.5])
    assert "paired by round" in uneven and "with a 95 % interval" in uneven and "0.50–3.00" in uneven
    assert "paired by round" not in even
    few = told([1, 2, 9], [1, 1, 3])
    assert "median of 3 rounds, no interval under 5 rounds" in few and "–" not in few


def test_tokens_that_skip_feed_forwards_are_told(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = "tokens of skip-vision: attention sees them; 64 go through feed-forwards (dropped: skip_ffn)"
    for asked, end in (((), ", as many as others beside it keep"), (("--no-baselines",), "")):
        ran = cli("bench", "skip-vision", *QUICK, "--new-tokens", 1, *asked)
        assert (ran.status, ran.err) == (0, "")
        assert told + end in [line.rstrip() for line in ran.out.splitlines()]


def test_adaptive_recipes_are_marked(cli: Callable[..., Any]) -> None:
    out = cli("bench", "sparsevlm", *SMALL, "--no-baselines").out
    assert "≈" in out and "random" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("fastv", "--rounds", 2),
            "error: --rounds: expected an odd number, so that a median is a measured one",
        ),
        (("fastv", "--attention", "flash"), "error: --attention: expected sdpa or eager, got 'flash'"),
        (("fastv", "--keep", 1, "--flops", 0.5), "error: give only one of --keep, --average, --final and --flops"),
        (("fastv", "--layers", 2), "error: --layers and --width give random weights; the embedded model is tiny"),
        (
            ("fastv", "--width", 100, "--model", "llava-1.5-7b"),
            "error: width: expected a multiple of the head size",
        ),
        (("fastv", "--model", "llava-1.5", *QUICK), "error: no such model folder: llava-1.5"),
        (("fastv", "--save-plot", "x.jpg"), "error: --save-plot: expected a name that ends in .png, got x.jpg"),
        (("fast",), "did you mean"),
        (("fastv", "--tokens", 100, *SMALL), "error: tokens: a picture of this model has 576 vision tokens, got 100"),
        (("fastv", "--flops", 0.01, *SMALL), "the nearest valid budget is flops: 0."),
    ],
)
def test_mistakes(arguments: tuple[object, ...], message: str, cli: Callable[..., Any]) -> None:
    ran = cli("bench", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())
