"""`bench`: interval maths against closed forms, and what the sides have in common; never how long anything took."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, fixed, recipe, stage

import tokenprune as tp
from tokenprune.errors import BudgetError, InputError, UnsupportedModelError
from tokenprune.families.noise import Pictures, noise, smaller_picture, usual_pictures
from tokenprune.plot.times import plot_times
from tokenprune.recipe import load_recipe
from tokenprune.study.bench import Bench, bench, median_ratio
from tokenprune.study.bench.clock import Sample
from tokenprune.study.bench.sides import SMALLER, UNTOUCHED, sides

HALF = load_recipe(recipe("half", stage(2, fixed(0.5), raters="last_text", scorer={"type": "attention"})))
QUICK: dict[str, Any] = {"rounds": 3, "text": 9, "new_tokens": 3}

CONFIG = build("qwen2_5_vl").config

times = st.floats(1e-3, 1e3)


def test_three_pairs_by_hand() -> None:
    """P(median of a draw is the lowest) = P(two or three of 3 draws are it) = 7/27: beyond 2.5 % both ends are in."""
    found = median_ratio([3.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert median_ratio([4.0], [2.0]) == median_ratio([2.0], [1.0])


@pytest.mark.parametrize("n", [7, 15, 31])
def test_interval_is_that_of_the_drawn_bootstrap(n: int) -> None:
    """Against 200 000 draws of n pairs: the chance at the interval's ends is right to the noise of the draws."""
    rng = np.random.default_rng(n)
    ratios = np.sort(rng.gamma(4.0, size=n))
    found = median_ratio(list(ratios), [1.0] * n)
    medians = np.median(ratios[rng.integers(n, size=(200_000, n))], axis=1)
    for end, tail in ((found.low, 0.025), (found.high, 0.975)):
        below, at = (medians < end).mean(), (medians <= end).mean()
        assert below < tail + 0.002 and at > tail - 0.002
    assert found.value == np.median(ratios)


@given(pairs=st.lists(st.tuples(times, times), min_size=1, max_size=15).filter(lambda pairs: len(pairs) % 2 == 1))
def test_intervals_hold_their_value_and_invert(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    found, back = median_ratio(before, after), median_ratio(after, before)
    assert min(b / a for b, a in pairs) <= found.low <= found.value <= found.high <= max(b / a for b, a in pairs)
    assert math.isclose(found.value, 1 / back.value)
    same = median_ratio(before, before)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], "an odd number of pairs, got 2 and 2 times"),
        ([1.0], [1.0, 2.0, 3.0], "got 1 and 3 times"),
        ([], [], "got 0 and 0 times"),
        ([0.0], [1.0], "times must be above 0"),
    ],
)
def test_ratios_that_make_no_sense(before: list[float], after: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        median_ratio(before, after)


@pytest.fixture(scope="module")
def result() -> Bench:
    return bench(build("llava"), HALF, batches=(1, 2), **QUICK)


def test_every_side_at_every_batch(result: Bench) -> None:
    names = [UNTOUCHED, "half", "random", "uniform", SMALLER]
    assert [(row.name, row.batch) for row in result.rows] == [(name, batch) for batch in (1, 2) for name in names]
    for row in result.rows:
        assert len(row.samples) == len(row.untouched) == 3
        assert all(sample.prefill > 0 and sample.decode > 0 and sample.peak is None for sample in row.samples)
        assert all(0 <= sample.method < sample.prefill for sample in row.samples)
        assert all(0 < sample.vision < sample.prefill for sample in row.samples)
        assert (row.name in (UNTOUCHED, SMALLER)) == all(sample.method == 0 for sample in row.samples)
        assert row.untouched is result.rows[0 if row.batch == 1 else 5].untouched
    assert (result.tokens, result.attention, result.dtype, result.device) == (25, "sdpa", "float32", "cpu")


def test_beside_tokens_that_skip_the_baselines_have_as_many_as_run_whole() -> None:
    """Attention sees all of them there: as many would be all, and a baseline that drops nothing compares nothing."""
    model = build("llava", layers=4)
    asked = load_recipe(recipe("skip", stage("after_vision", fixed(0.25), sampler="uniform", dropped="skip_ffn")))
    with sides(model, asked, usual_pictures(model.config), text=9) as running:
        counts = []
        for side in running:
            side.run(side.prompt(text=9, batch=1), 1)
            counts.append(side.tokens_per_layer())
        whole = running[1].attached.report.feed_forward_tokens[0].tolist()
    assert counts[0] == counts[1] and counts[0] > whole
    assert counts[2] == counts[3] == whole


def test_equal_tokens_and_ceilings(result: Bench) -> None:
    """Half of 25 tokens from layer 2 of 8: 15.25 on average, so the others get 15."""
    rows = {row.name: row for row in result.rows[:5]}
    assert [row.tokens for row in rows.values()] == [25, (2 * 25 + 6 * 12) / 8, 15, 15, 15]
    told = tp.ledger(build("llava"), HALF, grids=[(1, 5, 5)], text=9, question=5, new_tokens=3, kv_bytes=4)
    assert rows["half"].ceiling() == told.untouched.prefill / told.reduced.prefill
    assert rows["half"].ceiling("total") == pytest.approx(1 / told.share("end_to_end"))
    assert rows["half"].ceiling("language") > rows["half"].ceiling()  # no recipe makes the tower cheaper
    assert rows["half"].ceiling("language") == pytest.approx(
        (told.untouched.decoder + 12800) / (told.reduced.decoder + told.reduced.method + 12800)
    )
    assert rows["half"].kv_share == told.reduced.kv_bytes / told.untouched.kv_bytes
    assert rows[UNTOUCHED].ceiling() == rows[UNTOUCHED].reached() == 1
    # Its tower sees fewer pixels, too; the others save in the decoder alone.
    assert rows[SMALLER].ceiling() > rows["uniform"].ceiling() > 1
    assert rows[SMALLER].kv_share == rows["uniform"].kv_share == (15 + 9) / (25 + 9)


def test_json_and_figure(result: Bench) -> None:
    facts = result.to_dict()
    row = facts["rows"][1]
    assert row["speedup"]["prefill"]["low"] is row["speedup"]["prefill"]["high"] is None  # three rounds are too few
    assert row["reached"]["prefill"] == row["speedup"]["prefill"]["value"] / row["ceiling"]["prefill"]
    assert len(row["samples"]) == 3
    figure = plot_times(result)
    assert len(figure.axes) == 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [r.name for r in result.rows[:5]]


def test_one_token_is_prefill_alone() -> None:
    alone = bench(build("qwen2_5_vl"), HALF, tokens=24, rounds=1, text=9, new_tokens=1, baselines=False)
    assert [row.name for row in alone.rows] == [UNTOUCHED, "half"]
    assert alone.rows[1].speedup("decode") is None and alone.rows[1].to_dict()["seconds"]["decode"] == 0
    assert len(plot_times(alone).axes) == 1


def test_numbers_of_a_row_by_hand(result: Bench) -> None:
    def sample(prefill: float, decode: float, method: float, peak: int | None = None) -> Sample:
        return Sample(prefill=prefill, vision=1, decode=decode, method=method, peak=peak)

    row = replace(
        result.rows[1],
        untouched=(sample(4, 1, 0), sample(6, 2, 0), sample(8, 1, 0)),
        samples=(sample(2, 2, 0.4, 5), sample(2, 1, 0.3, 9), sample(8, 1, 0.8, 7)),
    )
    speed, total = row.speedup(), row.speedup("total")
    assert speed is not None and total is not None
    assert (speed.value, speed.low, speed.high) == (2, None, None)
    assert total.value == 5 / 4
    language = row.speedup("language")
    assert language is not None
    assert (language.value, language.low, language.high) == (3, None, None)
    assert row.method_share == 0.1
    assert (row.peak, row.seconds("prefill")) == (9, 2)


def test_sides_share_weights_and_leave_no_trace() -> None:
    """Each side has modules of its own on the same storage; afterwards the model is as it was."""
    model = build("llava")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with sides(model, HALF, usual_pictures(model.config), text=9) as running:
        models = [side.model for side in running]
        assert len({id(one) for one in [model, *models]}) == 6
        for one in models:
            assert all(a is b for a, b in zip(model.parameters(), one.parameters(), strict=True))
        inputs = running[0].prompt(text=9, batch=1)
        running[0].run(inputs, 1)
        assert torch.equal(running[0].model(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(running[1].model(**inputs).logits, model(**inputs).logits)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_different_attention_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenprune.study.bench.sides as module

    twin = module._twin

    def other(model: Any) -> Any:
        made = twin(model)
        made.set_attn_implementation("eager")
        return made

    monkeypatch.setattr(module, "_twin", other)
    with pytest.raises(InputError, match="sides run different attention kernels: sdpa and eager"):
        bench(build("llava"), HALF, **QUICK)


@pytest.mark.parametrize("kind", ["adaptive", "merging", "after_vision"])
def test_equal_tokens_are_what_ran(kind: str) -> None:
    """Adaptive and merging recipes too: their tokens are read off a run."""
    found = bench(build("llava"), load_recipe(KINDS[kind]), rounds=1, text=9, new_tokens=1)
    tokens = {row.name: row.tokens for row in found.rows}
    assert tokens["random"] == tokens["uniform"] == math.floor(tokens[kind])
    assert tokens["random"] - 2 <= tokens[SMALLER] <= tokens["random"]
    told = found.rows[1].ledger
    assert told.exact == (kind != "adaptive")
    assert sum(row.vision for row in told.reduced.rows) / 8 == tokens[kind]  # the ledger is of what ran


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_compiled_on_every_side(family: str) -> None:
    """The untouched model too: it runs under a recipe without stages."""
    found = bench(
        build(family, layers=3),
        HALF,
        tokens=25 if family == "llava" else 24,
        rounds=1,
        text=9,
        new_tokens=2,
        compile={"backend": "eager"},
    )
    assert [row.name for row in found.rows] == [UNTOUCHED, "half", "random", "uniform", SMALLER]
    assert found.compiled and found.to_dict()["compiled"] is True
    assert found.rows[0].ceiling() == 1
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][1]
    assert told["seconds"]["method"] is told["method_share"] is None, "one graph has no clock inside"


def test_the_baselines_themselves() -> None:
    found = bench(build("llava"), load_recipe("random", keep=9), rounds=1, text=9, new_tokens=1)
    assert [row.name for row in found.rows] == [UNTOUCHED, "random", "uniform", SMALLER]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 4}, "rounds: expected an odd number, so that a median is a measured one, got 4"),
        ({"batches": (1, 1)}, r"batches: expected different batch sizes, got \[1, 1\]"),
        ({"batches": ()}, "batches: expected different batch sizes"),
        ({"batches": (0,)}, "batch: expected at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens: expected at least 1, got 0"),
        ({"warmup": 0}, "warmup: expected at least 1, got 0"),
        ({"tokens": 30}, "tokens: a picture of this model has 25 vision tokens, got 30; try 25"),
        ({"text": 4}, "text: 1 pictures need at least 5 other tokens, got 4"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(build("llava"), HALF, **{**QUICK, **changes})


def test_refusals_of_recipe_and_model() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match="nobody makes pictures of noise for llava_next"):
        bench(build("llava_next"), HALF, **QUICK)
    with pytest.raises(BudgetError):
        bench(model, load_recipe("fastv", average=0.1), **QUICK)


@given(tokens=st.integers(1, 4000))
def test_a_smaller_picture_is_nearly_as_large(tokens: int) -> None:
    ((_, rows, columns),) = smaller_picture(CONFIG, tokens).grids
    assert tokens * 0.85 - 1 < rows * columns <= tokens
    assert rows <= columns <= 2 * rows


def test_noise_is_the_same_each_time_and_has_what_was_asked_for() -> None:
    model = build("llava")
    pictures = Pictures(((1, 5, 5),) * 2)
    first, again = (noise(model, pictures, text=11, batch=2) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    ids = first["input_ids"]
    assert (ids == model.config.image_token_id).sum(1).tolist() == [50, 50]
    assert ids.shape == (2, 61)
    with tp.attach(model, "none") as attached, torch.no_grad():
        model(**first)
    assert attached.report.grids == (((1, 5, 5), (1, 5, 5)),) * 2
