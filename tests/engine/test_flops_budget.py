"""The budget `flops` on real modules, solved for each sample's own prompt. What PyTorch counts: test_counters.py."""

from __future__ import annotations

import pytest
import torch
from families import Row, build, inputs, row_inputs
from kinds import ATTENTION, KINDS, recipe, stage

import tokenprune as tp
from tokenprune.errors import BudgetError

TWO = recipe(
    "two",
    stage(1, {"type": "solved"}, raters="last_text", scorer=ATTENTION),
    stage(4, {"type": "solved", "share": 0.5}, scorer="norm", recycler={"type": "cluster", "share": 0.5}),
)


def test_each_sample_is_solved_for_its_own_prompt() -> None:
    """Padding is no part of a prompt: a row of a batch keeps what it keeps alone, and a long question leaves fewer."""
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(after=5), Row(after=30)])
    with tp.attach(model, TWO, flops=0.8) as attached, torch.no_grad():
        model(**batch)
        together = attached.report.vision_tokens.tolist()
        for index, row in enumerate(together):
            model(**row_inputs(batch, index))
            assert attached.report.vision_tokens.tolist() == [row]
    assert sum(together[0]) != sum(together[1])


def test_an_answer_does_not_move_the_plan() -> None:
    """Without a cache every step reads prompt and answer again; only the prompt counts."""
    model = build("llava")
    batch = inputs("llava", model)
    plain = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    with tp.attach(model, TWO, flops=0.75) as attached:
        cached = model.generate(**batch, **plain)
        first = attached.report.vision_tokens.tolist()
        again = model.generate(**batch, **plain, use_cache=False)
        assert attached.report.vision_tokens.tolist() == first
    assert torch.equal(cached, again)


@pytest.mark.parametrize("kind", KINDS)
def test_all_flops_are_bit_identical(kind: str) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with torch.no_grad():
        plain = model(**batch).logits
        with tp.attach(model, KINDS[kind], flops=1.0):
            assert torch.equal(model(**batch).logits, plain)


def test_what_cannot_be_reached_is_refused_at_the_prompt() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, TWO, flops=0.05), pytest.raises(BudgetError, match="the nearest valid budget is flops: 0"):
        model(**batch)
    assert torch.isfinite(model(**batch).logits).all()
