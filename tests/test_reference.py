"""The masked reference is right: it equals a decoder loop, written out here, that really removes the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from families import (
    CACHE,
    FAMILIES,
    Attention,
    Batch,
    Row,
    Side,
    build,
    inputs,
    next_turn,
    row_inputs,
    vision_mask,
)
from reference import (
    Stage,
    generate_logits,
    masked_reference,
    pruned_difference,
    random_kept,
    reference_logits,
    surviving,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache

TOLERANCE = 1e-5

families = pytest.mark.parametrize("family", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])
STATIC: dict[str, Any] = {"cache_implementation": "static"}
NONE: dict[str, Any] = {"use_cache": False}
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
DRAW: dict[str, Any] = {"do_sample": True}


@pytest.fixture(autouse=True)
def _one_thread_no_gradients() -> Any:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return (first - second).abs().max().item()


def some_stages(vision: Tensor, layers: Sequence[int | None] = (2, 5), *, merge: bool = False) -> list[Stage]:
    """Half of the vision tokens survive each stage; with `merge`, one dropped token comes back as the mean of all."""
    kept, stages = None, []
    for number, layer in enumerate(layers):
        kept = random_kept(vision, 0.5, seed=number, within=kept)
        if not merge:
            stages.append(Stage(layer, kept))
            continue
        anchors, kept = kept[:, :1], kept[:, 1:]
        stages.append(Stage(layer, kept, anchors, lambda _, hidden: 2 * hidden.mean(0, keepdim=True)))
    return stages


def own(stages: Sequence[Stage], b: int) -> list[Stage]:
    """The stages of sample b alone."""
    row = slice(b, b + 1)
    return [
        stage._replace(kept=stage.kept[row], anchors=None if stage.anchors is None else stage.anchors[row])
        for stage in stages
    ]


def removed_logits(model: Any, sample: Batch, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and columns [N] of one unpadded sample: the decoder's loop, in which tokens really leave."""
    calls: list[dict[str, Any]] = []
    text = model.get_decoder()
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model(**sample)
    hook.remove()
    (call,) = calls
    hidden, position = call["inputs_embeds"], call["position_ids"]
    vision = vision_mask(model, sample["input_ids"])[0]
    columns, number = torch.arange(hidden.shape[1]), vision.cumsum(0) - 1
    if position is None:
        position = columns[None]
    for index, layer in enumerate(text.layers):
        for stage in stages:
            if (stage.layer or 0) == index:
                survivors = stage.kept[0] if stage.anchors is None else torch.cat([stage.kept[0], stage.anchors[0]])
                if stage.anchors is not None and callable(stage.merged):
                    present = torch.zeros(len(vision), hidden.shape[-1])  # tokens that left earlier are 0
                    present[columns] = hidden[0]
                    anchors = torch.isin(columns, vision.nonzero()[stage.anchors[0]])
                    hidden = hidden.clone()
                    hidden[0, anchors] = stage.merged(0, present[vision])
                stay = ~vision[columns] | torch.isin(number[columns], survivors)
                hidden, position, columns = hidden[:, stay], position[..., stay], columns[stay]
        causal = torch.ones(len(columns), len(columns)).tril().bool()[None, None]
        rotary = text.rotary_emb(hidden, position)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, **{CACHE: None})
        deepstack = call.get("deepstack_visual_embeds") or []
        if index < len(deepstack):
            own_features = deepstack[index][number[columns[vision[columns]]]]
            hidden = hidden.masked_scatter(vision[columns][None, :, None], hidden[0, vision[columns]] + own_features)
    return model.lm_head(text.norm(hidden))[0], columns


@pytest.mark.in_turn(3)
@families
@sides
@pytest.mark.parametrize("layers", [(None,), (0, 3), (2, 5), (1, 2, 7)])
def test_equals_removal(family: str, side: Side, layers: tuple[int | None, ...]) -> None:
    """The heart of the matter: hidden in a padded batch, or removed from each sample alone, the logits are the same."""
    model = build(family)
    batch = inputs(family, model, side=side)
    vision = vision_mask(model, batch["input_ids"])
    stages = some_stages(vision, layers)
    logits = reference_logits(model, batch, stages)
    places = surviving(vision, batch["attention_mask"], stages[-1].kept)
    for b in range(2):
        expected, columns = removed_logits(model, row_inputs(batch, b), own(stages, b))
        first = int(batch["attention_mask"][b].argmax())
        assert torch.equal(places[b], columns + first)
        assert difference(logits[b, places[b]], expected) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropped_token_that_sees_nothing_else(attention: Attention) -> None:
    """A prompt that begins with its image: the first vision token, dropped, has only itself to look at."""
    model = build("llava", attention=attention)
    sample = inputs("llava", model, rows=[Row(before=0)])
    stages = [Stage(1, torch.arange(1, 25, 2)[None])]
    logits = reference_logits(model, sample, stages)
    expected, columns = removed_logits(build("llava"), sample, stages)
    assert logits.isfinite().all()
    assert difference(logits[0, columns], expected) < TOLERANCE


@families
@pytest.mark.parametrize("layers", [(0, 3), (1, 5)])
def test_merged_tokens_equal_removal(family: str, layers: tuple[int, ...]) -> None:
    model = build(family)
    sample = row_inputs(inputs(family, model), 1)
    vision = vision_mask(model, sample["input_ids"])
    first, second = some_stages(vision, layers, merge=True)
    survivors = first.kept[0]  # the second stage may merge those only: tokens that left earlier mean nothing by then
    stages = [first, second._replace(merged=lambda _, hidden: hidden[survivors].sum(0, keepdim=True))]
    expected, columns = removed_logits(model, sample, stages)
    logits = reference_logits(model, sample, stages)
    assert difference(logits[0, columns], expected) < TOLERANCE
    unmerged = reference_logits(model, sample, [stage._replace(merged=None) for stage in stages])
    assert (logits - unmerged)[0, -1].abs().max() > 0.01


@families
def test_hiding_nothing_is_the_plain_model(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    everything = Stage(0, random_kept(vision, 1.0))
    plain = model(**batch).logits
    assert torch.equal(reference_logits(model, batch, []), plain)
    assert torch.equal(reference_logits(model, batch, [everything]), plain), "this batch has masks to begin with"
    alone = row_inputs(batch, 1)
    kept = own([everything], 1)
    assert difference(reference_logits(model, alone, kept), model(**alone).logits) < TOLERANCE, "this one has none"
    sequences, steps = generate_logits(model, alone)
    with masked_reference(model, vision_mask(model, alone["input_ids"]), kept):
        others, other_steps = generate_logits(model, alone)
    assert torch.equal(sequences, others) and difference(torch.stack(steps), torch.stack(other_steps)) < TOLERANCE


@families
def test_hiding_acts_where_it_should(family: str) -> None:
    """Unseen before its layer and before the first dropped token; plain to see at the last token."""
    model = build(family)
    sample = row_inputs(inputs(family, model), 0)
    vision = vision_mask(model, sample["input_ids"])
    stage = Stage(3, torch.arange(4, int(vision.sum()))[None])  # drops the first four
    plain = model(**sample, output_hidden_states=True)
    with masked_reference(model, vision, [stage]):
        hidden = model(**sample, output_hidden_states=True)
    for index in range(4):
        assert torch.equal(hidden.hidden_states[index], plain.hidden_states[index])
    assert not torch.equal(hidden.hidden_states[4], plain.hidden_states[4])
    before = (
        int(vision[0].int().argmax()) + 1
    )  # the first dropped token has only text before it, so it is untouched too
    assert difference(hidden.logits[:, :before], plain.logits[:, :before]) < TOLERANCE
    assert (hidden.logits - plain.logits)[0, -1].abs().max() > 0.02
    assert hidden.logits.isfinite().all()


@families
@sides
def test_eager_equals_sdpa(family: str, side: Side) -> None:
    model, eager = build(family), build(family, attention="eager")
    batch = inputs(family, model, side=side)
    real = batch["attention_mask"].bool()
    stages = some_stages(vision_mask(model, batch["input_ids"]), merge=True)
    assert (
        difference(reference_logits(eager, batch, stages)[real], reference_logits(model, batch, stages)[real])
        < TOLERANCE
    )
    if side == "left":
        for source in (batch, row_inputs(batch, 0)):
            vision = vision_mask(model, source["input_ids"])
            cut = stages if source is batch else own(stages, 0)
            for cache in ({}, STATIC):
                with masked_reference(model, vision, cut), masked_reference(eager, vision, cut):
                    sequences, steps = generate_logits(model, source, **cache)
                    eager_sequences, eager_steps = generate_logits(eager, source, **cache)
                assert torch.equal(sequences, eager_sequences)
                assert difference(torch.stack(steps), torch.stack(eager_steps)) < TOLERANCE


@pytest.mark.in_turn(3)
@families
@pytest.mark.parametrize(
    ("options", "cache"), [({}, {}), ({}, STATIC), ({}, NONE), (BEAMS, {}), (BEAMS, NONE), (DRAW, STATIC)]
)
def test_every_step_of_generate(family: str, options: dict[str, Any], cache: dict[str, Any]) -> None:
    """Each step's logits equal one masked forward over the finished answer; a row alone answers as in the batch."""
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    stages = some_stages(vision, merge=True)
    with masked_reference(model, vision, stages):
        sequences, steps = generate_logits(model, batch, **options, **cache)
        expected = model(**whole(batch, sequences[:: len(sequences) // 2])).logits
    _, plain = generate_logits(model, batch, **options, **cache)
    assert (plain[0] - steps[0]).abs().max() > 0.02
    if "num_beams" not in options:  # beams change rows between steps: their sequences are compared instead
        for i, step in enumerate(steps):
            assert difference(step, expected[:, batch["input_ids"].shape[1] - 1 + i]) < TOLERANCE
    if "do_sample" not in options:  # a row alone draws other random numbers
        alone = row_inputs(batch, 1)
        with masked_reference(model, vision_mask(model, alone["input_ids"]), own(stages, 1)):
            own_sequences, _ = generate_logits(model, alone, **options)
        assert torch.equal(own_sequences[:, -6:], sequences[len(sequences) // 2 :, -6:])


def whole(batch: Batch, sequences: Tensor) -> Mapping[str, Tensor]:
    """The batch with answers appended to the prompts; row i of `sequences` answers row i."""
    grown = next_turn(batch, sequences, words=0)
    return {**batch, **grown}


@families
def test_several_answers_of_a_row_see_the_same(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    with masked_reference(model, vision, some_stages(vision)):
        _, single = generate_logits(model, batch, max_new_tokens=1)
        _, double = generate_logits(model, batch, max_new_tokens=1, do_sample=True, num_return_sequences=2)
    assert difference(double[0], single[0].repeat_interleave(2, dim=0)) < TOLERANCE


@families
@pytest.mark.parametrize("static", [False, True])
def test_second_turn_keeps_them_hidden(family: str, static: bool) -> None:
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=150) if static else DynamicCache(config=config)
    with masked_reference(model, vision, some_stages(vision, merge=True)):
        sequences, _ = generate_logits(model, batch, **{CACHE: cache})
        turn = next_turn(batch, sequences, words=70)  # as long as the first turn: slots must not be mixed up
        longer, steps = generate_logits(model, turn, **{CACHE: cache})
        expected = model(**whole(batch, longer)).logits
    start = turn["input_ids"].shape[1] - 1
    assert difference(torch.stack(steps, dim=1), expected[:, start : start + len(steps)]) < TOLERANCE
    assert (expected - model(**whole(batch, longer)).logits)[:, start].abs().max() > 0.02


def test_second_turn_with_another_image() -> None:
    """The mask covers both turns; kept counts the vision tokens of both."""
    model = build("llava")
    batch = row_inputs(inputs("llava", model, rows=[Row()]), 0)
    second = inputs("llava", model, rows=[Row(before=2, after=4)], seed=7)
    cache = DynamicCache(config=model.config.get_text_config())
    first_kept, second_kept = random_kept(vision_mask(model, batch["input_ids"]), 0.5), torch.arange(25, 50, 3)[None]
    with masked_reference(model, vision_mask(model, batch["input_ids"]), [Stage(2, first_kept)]):
        sequences, _ = generate_logits(model, batch, **{CACHE: cache})
    ids = torch.cat([sequences, second["input_ids"]], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
    stages = [Stage(2, torch.cat([first_kept, second_kept], dim=1))]
    with masked_reference(model, vision_mask(model, ids), stages):
        _, steps = generate_logits(model, turn, **{CACHE: cache}, max_new_tokens=1)
    pixels = torch.cat([batch["pixel_values"], second["pixel_values"]])
    expected = reference_logits(model, {**turn, "pixel_values": pixels}, stages)
    assert difference(steps[0], expected[:, -1]) < TOLERANCE


def test_merged_hidden_states_may_be_given() -> None:
    """As a tensor [B, M, D] or as a function, padded where samples have fewer anchors; an anchor may be in kept too."""
    model = build("qwen2_vl")
    batch = inputs("qwen2_vl", model)
    kept, anchors = torch.tensor([[0, 5, -1], [1, 2, 30]]), torch.tensor([[5, -1], [7, 2]])
    values = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(3))
    given = reference_logits(model, batch, [(1, kept, anchors, values)])
    computed = reference_logits(model, batch, [(1, kept, anchors, lambda b, hidden: values[b, : 2 if b else 1])])
    assert torch.equal(given, computed)
    other = reference_logits(model, batch, [(1, kept, anchors, values + 1)])
    assert (given - other)[:, -1].abs().amax(-1).min() > 0.01


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="transformers before 5.23 reads a prompt with images in chunks wrongly, without any stage too",
)
@families
def test_chunked_prefill(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    vision = vision_mask(model, batch["input_ids"])
    kept, anchors = random_kept(vision, 0.5), torch.tensor([[3, 14], [9, 30]])  # in different chunks
    values = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(3))
    with masked_reference(model, vision, [Stage(2, kept, anchors, values)]):
        sequences, steps = generate_logits(model, batch)
        chunked, chunked_steps = generate_logits(model, batch, prefill_chunk_size=16)
    assert torch.equal(sequences, chunked)
    assert difference(torch.stack(steps), torch.stack(chunked_steps)) < TOLERANCE
    with (
        masked_reference(model, vision, some_stages(vision, merge=True)),
        pytest.raises(ValueError, match="one forward"),
    ):
        generate_logits(model, batch, prefill_chunk_size=16)


def test_hooks_leave_no_trace() -> None:
    model = build("llava_next")
    batch = inputs("llava_next", model)
    plain = model(**batch).logits
    vision = vision_mask(model, batch["input_ids"])
    with pytest.raises(RuntimeError, match="stop"), masked_reference(model, vision, some_stages(vision)):
        raise RuntimeError("stop")
    assert torch.equal(model(**batch).logits, plain)


def test_mistakes_are_told() -> None:
    model: Any = build("llava")
    batch = inputs("llava", model)
    vision = vision_mask(model, batch["input_ids"])
    grown = [Stage(1, random_kept(vision, 3)), Stage(4, random_kept(vision, 5, seed=1))]
    with pytest.raises(ValueError, match="before layer 4 keeps vision tokens that an earlier stage dropped"):
        reference_logits(model, batch, grown)
    with (
        masked_reference(model, vision, some_stages(vision)),
        pytest.raises(ValueError, match="1 rows in the model, 2"),
    ):
        model(**row_inputs(batch, 0))
    alone = row_inputs(batch, 1)
    text = model.get_decoder()
    text.layers[2].register_forward_pre_hook(lambda *_: setattr(text.config, "_attn_implementation", "flex_attention"))
    with pytest.raises(ValueError, match="flex_attention"):
        reference_logits(model, alone, own(some_stages(vision), 1))
    text.config._attn_implementation = "flash_attention_2"
    padded = torch.ones(1, alone["input_ids"].shape[1])
    with (
        masked_reference(model, vision[1:], own(some_stages(vision), 1)),
        pytest.raises(ValueError, match="4 dimensions"),
    ):
        text.layers[2](torch.zeros(1, padded.shape[1], 64), attention_mask=padded)


def test_surviving_and_pruned_difference() -> None:
    vision = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 0]]).bool()
    attention = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    kept = torch.tensor([[2, -1], [0, 1]])
    assert [row.tolist() for row in surviving(vision, attention, kept)] == [[1, 4, 5], [0, 1, 2, 3, 5]]
    assert [row.tolist() for row in surviving(vision, attention, kept, padding=True)] == [[0, 1, 4, 5], [0, 1, 2, 3, 5]]
    anchors = torch.tensor([[0], [-1]])
    assert [row.tolist() for row in surviving(vision, attention, kept, anchors)] == [[1, 2, 4, 5], [0, 1, 2, 3, 5]]
    reference = torch.randn(2, 6, 9)
    pruned = pad_sequence([reference[0, [0, 1, 4, 5]], reference[1, [0, 1, 2, 3, 5]]], True, padding_side="left")
    pruned[0, 1] += 100  # prompt padding is not compared
    assert pruned_difference(pruned, reference, vision, attention, kept) == 0
    pruned[0, 2] += 1
    assert pruned_difference(pruned, reference, vision, attention, kept) == pytest.approx(1, abs=1e-6)


def test_random_kept() -> None:
    vision = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    share, count = random_kept(vision, 0.5), random_kept(vision, 3)
    assert share.shape == (2, 2) and count.shape == (2, 3)
    assert count[1].tolist() == [0, 1, -1] and (share[1] == torch.tensor([share[1, 0], -1])).all()
    assert (count[0].diff() > 0).all() and random_kept(vision, 1.0)[0].tolist() == [0, 1, 2, 3, 4]
    nested = random_kept(vision, 1, within=count)
    assert nested.shape == (2, 1) and torch.isin(nested[0], count[0]).all()
    assert torch.equal(random_kept(vision, 0.5), share)
