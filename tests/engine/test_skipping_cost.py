"""What tokens that skip the feed-forward cost: the ledger against two counters, and budgets of multiply-adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Row, build, inputs, sizes, vision_mask
from kinds import fixed, recipe, stage

import tokenprune as tp
from tokenprune.cost.presets import PRESETS
from tokenprune.study.counters import fvcore_counts, torch_counts
from tokenprune.study.evaluate.cost import Meter

SKIP = recipe("skip", stage(3, fixed(5), scorer="norm", dropped="skip_ffn"))
BEHIND = recipe(
    "behind",
    stage("after_vision", fixed(0.6), scorer="norm", recycler={"type": "cluster", "share": 0.2}),
    stage(2, fixed(0.3), scorer="norm", dropped="skip_ffn", kv="all_layers"),
)
SUMMED = recipe("summed", stage(2, fixed(5), scorer="norm", recycler="summary", dropped="skip_ffn"))


def prompt(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, a batch of one, and what the ledger must be told of it."""
    model = build(family, layers=5)
    batch = inputs(family, model, rows=[Row(images=(sizes(family)[0],))])
    vision = vision_mask(model, batch["input_ids"])[0]
    with tp.attach(model, "uniform") as attached, torch.no_grad():
        model(**batch)
    question = int((~vision[int(vision.nonzero()[0]) :]).sum())
    text = int((~vision).sum())
    return model, batch, {"grids": attached.report.grids[0], "text": text, "question": question}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("asked", [SKIP, BEHIND, SUMMED], ids=["skip", "behind", "summed"])
def test_counters_count_the_same_in_each_layer(family: str, asked: Any) -> None:
    """To the last multiply-add with PyTorch's; fvcore's sees the stage beside its layer."""
    model, batch, told = prompt(family)
    cost = tp.ledger(model, asked, **told).reduced
    with tp.attach(model, asked) as attached:
        counts = torch_counts(model, batch)
        report = attached.report
        traced = fvcore_counts(model, batch, use_cache=False, logits_to_keep=1)
        measured = Meter(model).prefills(
            tp.load_recipe(asked), report, batch["input_ids"], batch["attention_mask"].bool()
        )
    assert [row.vision for row in cost.rows] == report.vision_tokens[0].tolist()
    assert [row.fed for row in cost.rows] == report.feed_forward_tokens[0].tolist()
    assert cost.rows[-1].fed < cost.rows[-1].vision
    for row in cost.rows:
        name = f"model.language_model.layers.{row.layer}"
        method = sum(each.total for each in cost.stages if each.layer == row.layer)
        assert counts[name] == row.total + method
        assert traced[name] == pytest.approx(row.total, rel=0.01)
    assert counts[""] == cost.prefill == measured[0]


def test_the_saving_is_the_feed_forward_of_what_skips_and_its_slots() -> None:
    skip, leave = (
        tp.ledger(
            "llava-1.5-7b",
            recipe("x", stage(8, fixed(64), sampler="uniform", dropped=dropped)),
            text=64,
            new_tokens=9,
        )
        for dropped in ("skip_ffn", "leave")
    )
    decoder = PRESETS["llava-1.5-7b"].decoder
    saved = 24 * (576 - 64) * 3 * 4096 * 11008
    assert skip.untouched.decoder - skip.reduced.decoder == saved
    assert [row.attention for row in skip.reduced.rows] == [decoder.attention(640, 640)] * 32
    assert skip.reduced.decode == leave.reduced.decode
    assert skip.reduced.kv_bytes == leave.reduced.kv_bytes
    assert leave.reduced.prefill < skip.reduced.prefill < skip.untouched.prefill


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_a_budget_of_flops_is_what_torch_counts(share: float) -> None:
    model, batch, told = prompt("llava")
    asked = recipe("x", stage(1, {"type": "solved"}, scorer="norm", dropped="skip_ffn"))
    untouched = torch_counts(model, batch)[""]
    ledger = tp.ledger(model, asked, **told, flops=share)
    with tp.attach(model, asked, flops=share) as attached:
        reduced = torch_counts(model, batch)[""]
    assert (untouched, reduced) == (ledger.untouched.prefill, ledger.reduced.prefill)
    kept = attached.report.stages[0].sizes[0]
    more = tp.ledger(model, asked, **told, final=kept + 1)
    assert reduced <= share * untouched < more.reduced.prefill
