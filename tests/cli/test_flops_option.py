"""`--flops` wherever a budget is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import tokenprune as tp


def test_flops_and_show_solve_the_same_counts(cli: Callable[..., Any]) -> None:
    """`show` knows no model: it takes LLaVA-1.5-7B's layers."""
    told = json.loads(cli("flops", "pyramiddrop", "--flops", "50%", "--text", 118, "--json").out)
    shown = json.loads(cli("show", "pyramiddrop", "--flops", 0.5, "--text", 118, "--json").out)
    kept = [stage["kept"] for stage in told["reduced"]["stages"]]
    assert [stage["kept"] for stage in shown["stages"]] == kept
    expected = tp.ledger("llava-1.5-7b", "pyramiddrop", flops=0.5, text=118).reduced.stages
    assert kept == [stage.kept for stage in expected]
    assert (shown["budget"], shown["exact"]) == ({"flops": 0.5}, True)


def test_run_keeps_within_the_share(cli: Callable[..., Any]) -> None:
    facts = json.loads(cli("run", "--recipe", "fastv", "--flops", 0.7, "--json").out)
    assert 1 < facts["final"] < facts["total"]
    everything = json.loads(cli("run", "--recipe", "fastv", "--flops", 1, "--json").out)
    assert everything["final"] == everything["total"]


@pytest.mark.parametrize("command", ["show", "flops", "bench"])
@pytest.mark.parametrize("share", ["0", "1.5", "64", "half", "-3%"])
def test_only_shares(command: str, share: str, cli: Callable[..., Any]) -> None:
    ran = cli(command, "fastv", f"--flops={share}")
    assert (ran.status, ran.out) == (2, "")
    assert f"--flops: expected a share in (0, 1] such as 0.35, got '{share}'" in " ".join(ran.err.split())


def test_out_of_reach_names_what_is_possible(cli: Callable[..., Any]) -> None:
    ran = cli("show", "fastv", "--flops", "0.05")
    assert ran.status == 2 and "the nearest valid budget is flops: 0." in " ".join(ran.err.split())
