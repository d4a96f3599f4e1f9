"""Arguments that name places of the prompt: labels and logits_to_keep, mapped through the survivors or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Batch, Row, build, inputs, text_only_inputs, vision_mask
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, stage_results
from reference import masked_reference, reference_logits
from torch import Tensor

import tokenprune as tp
from tokenprune.errors import InputError, UnsupportedModelError

KEEPS = {**recipe("keeps", *KINDS["attention"]["stages"]), "budget": {"keep": 1.0}}
BY_NORM = recipe("norm", stage(2, fixed(0.5), scorer="norm"))


UNIFORM = recipe("uniform", stage(2, fixed(5), sampler="uniform"))


def labels_of(model: Any, batch: Batch) -> Tensor:
    """Every text token, but those behind a picture."""
    vision = vision_mask(model, batch["input_ids"])
    behind = torch.zeros_like(vision)
    behind[:, 1:] = vision[:, :-1]
    return batch["input_ids"].masked_fill(vision | behind | (batch["attention_mask"] == 0), -100)


def loss_of(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    pairs = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(*pairs, **options)


def asked(model: Any, batch: Batch, recipe: Any, **options: Any) -> tuple[Any, Tensor]:
    """Output of a call with the recipe on, and the masked reference's logits ``[B, L, V]``."""
    with torch.no_grad(), tp.attach(model, recipe) as attached, stage_results(attached) as results:
        output = model(**batch, **options)
    return output, reference_logits(model, batch, reference_stages(attached.report, results))


# ------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_masked_reference_s(family: str) -> None:
    model = build(family)
    for side in ("left", "right"):
        batch = inputs(family, model, side=side)
        labels = labels_of(model, batch)
        for name in ("after_vision", "adaptive", "merging") if family == "llava" else ("adaptive",):
            output, reference = asked(model, batch, KINDS[name], labels=labels)
            assert abs(output.loss - loss_of(reference, labels)) < TOLERANCE, (side, name)
            assert output.logits.shape[1] < reference.shape[1]


def test_a_loss_in_the_ways_that_trainers_ask_for_it() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    labels = labels_of(model, batch)
    output, reference = asked(model, batch, BY_NORM, labels=labels, num_items_in_batch=7)
    assert abs(output.loss - loss_of(reference, labels, reduction="sum") / 7) < TOLERANCE
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    output, _ = asked(model, batch, BY_NORM, labels=labels, shift_labels=shifted)
    assert abs(output.loss - loss_of(reference, labels)) < TOLERANCE
    output, _ = asked(model, batch, BY_NORM, labels=labels, return_dict=False)
    assert isinstance(output, tuple) and abs(output[0] - loss_of(reference, labels)) < TOLERANCE
    untouched = model(**batch, labels=labels, return_dict=False)
    assert output[1].shape[-1] == 200 and [type(each) for each in output] == [type(each) for each in untouched]
    zeros = labels.masked_fill(labels == -100, 0)
    output, _ = asked(model, batch, BY_NORM, labels=zeros, ignore_index=0)
    assert abs(output.loss - loss_of(reference, labels)) < TOLERANCE


def test_a_loss_has_the_gradients_of_the_masked_reference() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    labels, weight = labels_of(model, batch), model.get_decoder().layers[1].mlp.up_proj.weight
    with tp.attach(model, BY_NORM) as attached, stage_results(attached) as results:
        model(**batch, labels=labels).loss.backward()
    ours, weight.grad = weight.grad, None
    stages = reference_stages(attached.report, results)
    with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
        model(**batch, labels=labels).loss.backward()
    torch.testing.assert_close(ours, weight.grad)


def test_labels_behind_dropped_tokens_are_refused() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    labels = labels_of(model, batch)
    last = int(vision_mask(model, batch["input_ids"])[0].nonzero()[-1])
    labels[0, last + 1] = 9
    with tp.attach(model, UNIFORM), pytest.raises(InputError, match="labels: 1 stand behind a vision token"):
        model(**batch, labels=labels)  # five of 25, in the middle of their shares: the last is gone
    with tp.attach(model, BY_NORM), pytest.raises(InputError, match="expected one for each token of the call"):
        model(**batch, labels=labels[:, :20])
    logits_of(model, batch)  # a refusal leaves nothing behind


@pytest.mark.parametrize("harmless", [recipe("none"), KEEPS], ids=["none", "keep 1.0"])
def test_where_nothing_is_dropped_labels_are_what_they_were(harmless: dict[str, Any]) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    everything = {"labels": batch["input_ids"], "logits_to_keep": 0}
    with torch.no_grad():
        plain = model(**batch, **everything)
        with tp.attach(model, harmless):
            attached = model(**batch, **everything)
    assert torch.equal(attached.loss, plain.loss) and torch.equal(attached.logits, plain.logits)
    text = text_only_inputs("llava", model)
    with torch.no_grad(), tp.attach(model, BY_NORM):
        pruned = model(**text, labels=text["input_ids"]).loss
    assert torch.equal(pruned, model(**text, labels=text["input_ids"]).loss)


# ----------------------------------------------------------------------------------------------- logits_to_keep


@pytest.mark.parametrize("kind", ["after_vision", "adaptive"])
def test_places_are_those_of_the_whole_prompt(kind: str) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    real = batch["attention_mask"].bool()
    text = ~vision_mask(model, batch["input_ids"]) & real
    length = text.shape[1]
    last = torch.tensor([length - 1, length - 5, length - 2])
    each = torch.stack([row.nonzero()[:6, 0] for row in text])
    for places in (last, last - length, each):
        output, reference = asked(model, batch, KINDS[kind], logits_to_keep=places)
        expected = reference.gather(1, (places % length).expand(2, -1)[..., None].expand(-1, -1, 200))
        assert output.logits.shape == expected.shape
        assert (output.logits - expected).abs().max() < TOLERANCE
    output, reference = asked(model, batch, KINDS[kind], logits_to_keep=text)
    assert (output.logits - reference[text]).abs().max() < TOLERANCE
    common = text.all(0)
    output, reference = asked(model, batch, KINDS[kind], logits_to_keep=common)
    assert (output.logits - reference[:, common]).abs().max() < TOLERANCE
    output, reference = asked(model, batch, KINDS[kind], logits_to_keep=4)
    assert (output.logits - reference[:, -4:]).abs().max() < TOLERANCE


def test_padding_of_a_row_that_got_shorter_is_nobody_s_place() -> None:
    """Rows of one length; the second begins with a picture, loses more, and is padded with what repeats its start."""
    model = build("llava")
    two = ((20, 20), (20, 20))
    batch = inputs("llava", model, rows=[Row(before=32, after=7), Row(before=0, images=two, between=7, after=7)])
    assert batch["attention_mask"].all()
    first = recipe("first", stage(2, fixed(5), scorer="raster"))
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[:, 0] = True
    for places in (torch.tensor([0]), mask):
        with (
            tp.attach(model, first),
            pytest.raises(InputError, match="place 0 of 64 is a vision token that"),
        ):
            logits_of(model, batch, logits_to_keep=places)


def test_labels_of_kept_places_stand_beside_them() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    labels = batch["input_ids"][:, -4:]
    for keep in (4, torch.arange(-4, 0)):
        output, reference = asked(model, batch, BY_NORM, logits_to_keep=keep, labels=labels)
        assert abs(output.loss - loss_of(reference[:, -4:], labels)) < TOLERANCE


@pytest.mark.parametrize("batch_of", [inputs, text_only_inputs])
def test_places_are_the_untouched_model_s_where_nothing_is_dropped(batch_of: Any) -> None:
    model = build("llava")
    batch = batch_of("llava", model)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, 3:7] = mask[1, -2:] = True
    for places in (torch.tensor([4, -1]), mask, mask[0]):
        plain = logits_of(model, batch, logits_to_keep=places)
        with tp.attach(model, KEEPS):
            assert torch.equal(logits_of(model, batch, logits_to_keep=places), plain)


def test_places_of_dropped_tokens_and_beyond_the_prompt_are_refused() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    length = batch["input_ids"].shape[1]
    first = recipe("first", stage(2, fixed(5), scorer="raster"))
    dropped = [int(vision_mask(model, batch["input_ids"])[1].nonzero()[place]) for place in (0, -1)]
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[1, dropped] = True
    for places in (torch.tensor(dropped), mask, 30):
        with tp.attach(model, first), pytest.raises(InputError, match=r"place \d+ of 62 is a vision token that the"):
            logits_of(model, batch, logits_to_keep=places)
    with tp.attach(model, first), pytest.raises(InputError, match=rf"expected places in -{length} … {length - 1}"):
        logits_of(model, batch, logits_to_keep=torch.tensor([length]))


def test_bounds_of_packed_sequences_are_refused_where_the_sequence_gets_shorter() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    bounds = torch.tensor([0, batch["input_ids"].shape[1]])
    with tp.attach(model, BY_NORM), pytest.raises(UnsupportedModelError, match="cu_seq_lens_q: bounds of sequences"):
        logits_of(model, batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
