"""What the load benchmark works out of its runs, and asks: without vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "serving" / "load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(seconds: float, first: list[float], **more: float) -> dict[str, Any]:
    numbers = {"peak_blocks": 5, "prompt": [9], "from_cache": 0, "preparing": 0.0, "tower": 0.0, "choosing": 0.0}
    return {"seconds": seconds, "first_token": first, **numbers, **more}


def test_ratios_are_those_within_a_round_and_tails_are_those_of_all_first_tokens(load: ModuleType) -> None:
    """The machine is ten times slower in the second round, for both sides alike."""
    untouched = [run(2.0, [0.1] * 50, peak_blocks=7), run(20.0, [1.0] * 50, peak_blocks=9), run(2.0, [])]
    faster = [run(1.0, [0.2] * 99), run(5.0, [9.0], tower=2.5, choosing=0.5), run(0.5, [])]
    kept = {"untouched": dict.fromkeys(load.LOADS, untouched), "x": dict.fromkeys(load.LOADS, faster)}
    told = load.summary(kept)
    assert set(told) == set(load.LOADS)
    for name, (_, count, _) in load.LOADS.items():
        one, other = told[name]["untouched"], told[name]["x"]
        assert (one["times_untouched"], one["times_untouched_range"]) == (1.0, [1.0, 1.0])
        assert (other["times_untouched"], other["times_untouched_range"]) == (4.0, [2.0, 4.0])
        assert other["requests_per_second"] == count / 1.0 and one["requests_per_second"] == count / 2.0
        assert (other["first_token_p50"], other["first_token_p99"], other["first_tokens"]) == (0.2, 9.0, 100)
        assert one["peak_blocks"] == 9 and (other["tower"], other["choosing"]) == (0.0, 0.0)
    only = load.summary({"untouched": dict.fromkeys(load.LOADS, faster[1:2])})["repeated"]["untouched"]
    assert (only["tower"], only["choosing"]) == (0.5, 0.1)


def test_the_committed_rows_follow_from_the_committed_runs(load: ModuleType) -> None:
    models = json.loads(FILE.with_name("load.json").read_text())["models"]
    rows = 0
    for told in models.values():
        made = load.summary(told["runs"])
        for name, sides in told["summary"].items():
            for side, row in sides.items():
                rows += 1
                for fact, value in row.items():  # the file is rounded to six digits
                    assert made[name][side][fact] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, side, fact)
                seconds = median(each["seconds"] for each in told["runs"][side][name])
                assert row["requests_per_second"] == pytest.approx(load.LOADS[name][1] / seconds, rel=1e-4)
    assert rows == sum(len(sides) for sides in load.SIDES.values()) * len(load.LOADS)


def test_requests_are_the_same_for_all_sides_and_pictures_repeat_where_they_should(load: ModuleType) -> None:
    def asked(side: str, repeat: int, seed: int = 3) -> list[tuple[str, dict[str, Any]]]:
        engine = object.__new__(load.Engine)
        engine.model, engine.side = "qwen", side
        return list(engine._requests(4, repeat, seed))

    def pictures(requests: list[tuple[str, dict[str, Any]]]) -> list[bytes]:
        return [each["multi_modal_data"]["image"].tobytes() for _, each in requests]

    one, other, small = asked("untouched", 1), asked("divprune", 1), asked("smaller-image", 1)
    assert pictures(one) == pictures(other) and len(set(pictures(one))) == 4
    assert [each["prompt"] for _, each in one] == [each["prompt"] for _, each in small]
    assert {each["multi_modal_data"]["image"].size for _, each in small} == {(load.SMALL, load.SMALL)}
    twice = asked("untouched", 2)
    assert [len(set(pictures(twice)[start : start + 2])) for start in (0, 2)] == [1, 1] and len(
        set(pictures(twice))
    ) == 2
    assert len({each["prompt"] for _, each in twice}) == 4  # the questions are new each time
    assert not {name for name, _ in one} & {name for name, _ in asked("untouched", 1, seed=4)}
    assert not set(pictures(one)) & set(pictures(asked("untouched", 1, seed=4)))


def test_sides_differ_in_what_they_say_they_do(load: ModuleType) -> None:
    plain, pruned = load._settings("qwen", "untouched"), load._settings("qwen", "divprune")
    assert "hf_overrides" not in plain and "hf_overrides" not in load._settings("qwen", "smaller-image")
    assert pruned["hf_overrides"]["tokenprune"] == {"recipe": "divprune", "keep": load.KEEP}
    assert load._settings("qwen", "none")["hf_overrides"]["tokenprune"] == {"recipe": "none"}
    for made in (plain, pruned):
        assert (made["max_num_batched_tokens"], made["block_size"]) == (2048, load.BLOCK)
    assert load._settings("steps", "divprune/640") == {**pruned, "max_num_batched_tokens": 640}
    embedded = load._settings("llava", "untouched")
    assert embedded["hf_overrides"]["architectures"] == ["TokenpruneLlava"] and "load_format" not in embedded
    assert embedded["hf_overrides"]["tokenprune"] == {"recipe": "none"}
