"""What a family can do, one check for each ability; `support.json` holds what they found, docs/models.md shows it.

A check raises `UnsupportedModelError` where the family refuses by name, `AssertionError` where it is not exact, and
nothing where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matrix
import torch
from double import Double, doubled
from families import CACHE, Row, inputs, next_turn, ragged_rows, row_inputs, vision_mask
from hidden_patches import differences, exact
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, stage_results, worst
from reference import generate_logits, masked_reference
from renumbered import numbered_through

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.noise import noise, usual_pictures
from tokenprune.families.shape import model_shape
from tokenprune.study.counters import torch_counts

FOUND = Path(__file__).parent / "support.json"
"""For each family what it refuses, and with which words: ``python scripts/support.py`` writes it."""


KEPT = recipe(
    "kept",
    stage("after_vision", fixed(1.0), sampler="uniform"),
    stage(5, {"type": "pyramid", "keep": 1.0}, scorer="norm", recycler="cluster"),
)
"""Stages that keep everything, and ask nothing that a family may refuse."""


def attention_rows(family: str) -> None:
    """What raters read is what eager attention gives, before and behind places in layers of any type."""
    model, eager = (matrix.model_of(family, attention) for attention in ("sdpa", "eager"))
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    with_attention = [i for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer, "self_attn")]
    with torch.no_grad():
        attentions = dict(zip(with_attention, eager(**batch, output_attentions=True).attentions, strict=True))
    for row in [index for index in with_attention if index < 5]:
        for source, place in (("previous", row + 1), ("next", row)):
            scorer = {"type": "attention", "layer": source}
            asked = recipe("rows", stage(place, fixed(0.5), raters="last_text", scorer=scorer))
            with tp.attach(model, asked) as attached:
                logits_of(model, batch)
                scores = attached.report.stages[0].scores
            for b, own in enumerate(vision):
                expected = attentions[row][b, :, -1, own].mean(0)  # padding stands on the left: the last is a word
                assert (scores[b, : len(expected)] - expected).abs().max() < TOLERANCE


def everything_kept(family: str) -> None:
    """``keep: 1.0`` is bit-identical, in generation and in one forward."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model)
    plain, full = generate_logits(model, batch, max_new_tokens=matrix.STEPS), logits_of(model, batch)
    with tp.attach(model, KEPT):
        kept = generate_logits(model, batch, max_new_tokens=matrix.STEPS)
        assert torch.equal(full, logits_of(model, batch))
    assert torch.equal(plain[0], kept[0]) and all(map(torch.equal, plain[1], kept[1]))
    again = generate_logits(model, batch, max_new_tokens=matrix.STEPS)
    assert all(map(torch.equal, plain[1], again[1])), "detaching left a trace"


def row_alone(family: str) -> None:
    """A row of a batch keeps the tokens, and gives the logits, of the sample alone."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model, rows=[*ragged_rows(family), Row(before=1, after=4)])
    with tp.attach(model, KINDS["merging"]) as attached:
        sequences, logits = generate_logits(model, batch, max_new_tokens=matrix.STEPS)
        together = attached.report.stages
        for row in range(3):
            single, alone = generate_logits(model, row_inputs(batch, row), max_new_tokens=matrix.STEPS)
            for stage, both in zip(attached.report.stages, together, strict=True):
                assert both.kept[row][both.kept[row] >= 0].tolist() == stage.kept[0].tolist()
            assert torch.equal(sequences[row, -matrix.STEPS :], single[0, -matrix.STEPS :])
            assert worst(tuple(step[row : row + 1] for step in logits), alone) < TOLERANCE


def second_turn(family: str) -> None:
    """A second turn of text on the same cache equals the masked reference's."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model)

    def two_turns() -> tuple[torch.Tensor, ...]:
        first = model.generate(**batch, max_new_tokens=matrix.STEPS, do_sample=False, return_dict_in_generate=True)
        following = next_turn(batch, first.sequences)
        return generate_logits(model, {**following, CACHE: first[CACHE]}, max_new_tokens=matrix.STEPS)[1]

    with tp.attach(model, KINDS["merging"]) as attached, stage_results(attached) as results:
        logits = two_turns()
    with masked_reference(model, vision_mask(model, batch["input_ids"]), reference_stages(attached.report, results)):
        expected = two_turns()
    assert worst(logits, expected) < TOLERANCE
    assert attached.report.prefills == 1


def prompt_lookup(family: str) -> None:
    """Prompt-lookup decoding, which reads candidates with the prompt and crops the cache, gives the greedy answer."""
    model = matrix.model_of(family, "sdpa")
    batch = row_inputs(inputs(family, model, rows=[Row(after=12)]), 0)
    try:
        model.generate(**batch, max_new_tokens=1, do_sample=False, prompt_lookup_num_tokens=3)
    except ValueError as error:
        raise UnsupportedModelError(f"transformers: {error}") from None
    with tp.attach(model, KINDS["merging"]):
        greedy = model.generate(**batch, max_new_tokens=8, do_sample=False)
        looked_up = model.generate(**batch, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, looked_up)


TWICE = recipe(
    "twice",
    stage(2, fixed(0.6), scorer="random", positions="renumber"),
    stage(5, fixed(0.3), scorer="norm", positions="renumber"),
)


def renumbered(family: str) -> None:
    """``positions: renumber`` equals the renumbered reference, and is seen."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    with tp.attach(model, TWICE) as attached:
        got, logits = generate_logits(model, batch, max_new_tokens=matrix.STEPS)
    stages = [(told.layer, told.kept) for told in attached.report.stages]
    with masked_reference(model, vision, stages):
        original = generate_logits(model, batch, max_new_tokens=matrix.STEPS)[1]
        with numbered_through(model, vision, batch["attention_mask"], stages):
            expected, expected_logits = generate_logits(model, batch, max_new_tokens=matrix.STEPS)
    assert torch.equal(got, expected)
    assert worst(logits, expected_logits) < TOLERANCE < worst(original, logits) / 10


def ledger(family: str) -> None:
    """The closed form is what PyTorch counts, untouched and with a recipe, to the last multiply-add."""
    model = matrix.model_of(family, "sdpa")
    batch = inputs(family, model, rows=[Row(after=9)])
    total = int(vision_mask(model, batch["input_ids"]).sum())
    model_shape(model)  # refuses first, where it does
    with tp.attach(model, "fastv", keep=0.4) as attached:
        reduced = torch_counts(model, batch)[""]
        grids = attached.report.grids[0]
    told = tp.ledger(model, "fastv", keep=0.4, tokens=total, grids=grids, text=batch["input_ids"].shape[1] - total)
    assert (told.untouched.prefill, told.reduced.prefill) == (torch_counts(model, batch)[""], reduced)


def bench(family: str) -> None:
    """Pictures of noise, of the usual size, run through the model."""
    model = matrix.model_of(family, "sdpa")
    pictures = usual_pictures(model.config)
    with tp.attach(model, "uniform", keep=0.5) as attached:
        logits_of(model, noise(model, pictures, text=9, batch=2))
    assert attached.report.total == (pictures.tokens,) * 2


def inside_the_tower(family: str) -> None:
    """Stages inside the vision tower equal the masked reference of tower and decoder, in float64."""
    model, eager = (exact(family, attention) for attention in ("sdpa", "eager"))
    with torch.no_grad(), Double():
        difference, without = differences(model, eager, doubled(inputs(family, model)))
    assert difference < 1e-12 < without / 1e9


CHECKS: dict[str, Callable[[str], None]] = {
    **{name: partial(matrix.run, cell) for name, cell in matrix.ABILITIES.items()},
    "keep 1.0": everything_kept,
    "row alone": row_alone,
    "second turn": second_turn,
    "prompt lookup": prompt_lookup,
    "renumber": renumbered,
    "in the tower": inside_the_tower,
    "ledger": ledger,
    "bench": bench,
}
"""Ability to check, in the order of the table's columns."""


def refusal(family: str, ability: str) -> str | None:
    """What the family says when it refuses this; None where it is exact."""
    try:
        CHECKS[ability](family)
    except UnsupportedModelError as error:
        return str(error)
    return None


def refused(family: str) -> dict[str, str]:
    """What was found: abilities that the family refuses, with its words."""
    return json.loads(FOUND.read_text(encoding="utf-8")).get(family, {}) if FOUND.is_file() else {}
