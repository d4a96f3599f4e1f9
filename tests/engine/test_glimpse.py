"""A glimpse behind the prompt: it looks where a position really appended to the prompt of an untouched model would."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import CACHE, Row, build, inputs, row_inputs, vision_mask
from glimpses import PER_TOKEN, Looking, appended, decoded, vectors_of
from pruned import TOLERANCE, logits_of, reference_stages, snapshot, stage_results
from reference import generate_logits, masked_reference
from renumbered import numbered_through
from torch import Tensor

import tokenprune as tp
from tokenprune.engine.packed.generate import shares_caches
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

LAYERS, PLACE = 6, 4


def looks(
    scorer: Looking, *before: Stage, place: int = PLACE, keep: int | float = 6, name: str = "glimpse"
) -> Pipeline:
    """A stage whose scorer is `scorer`, behind others."""
    own = Stage(place=place, scorer=scorer, scheduler=FixedScheduler(keep=keep), name=name)
    return Pipeline([*before, own], depth=LAYERS, name="looks")


def furthest(seen: Tensor, expected: Sequence[Tensor]) -> float:
    """Largest difference of ``[B, H, N]`` from what each sample alone gives ``[H, N]``."""
    return max(float((seen[row, :, : one.shape[1]] - one).abs().max()) for row, one in enumerate(expected))


FAMILIES = (
    "llava",
    "qwen2_5_vl",  # positions of three axes
    "qwen3_vl",  # norms on q and k, features added after layers
    "qwen3_omni_moe_thinker",  # positions that are no whole numbers
    "gemma3",  # windows, rotary embeddings by type of layer, pictures that see all of themselves
    "cohere2_vision",  # windows, a layer without rotary embedding
    "paligemma",  # the prompt sees all of itself
    "glm4v",  # norms behind attention
)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_looks_where_an_appended_position_would(family: str) -> None:
    eager = build(family, attention="eager", layers=LAYERS)
    vectors = vectors_of(eager)
    batch = inputs(family, eager)
    alone = decoded if family == "paligemma" else appended
    expected = [alone(eager, row_inputs(batch, row), vectors, PLACE - 1) for row in range(2)]
    assert max(float(one.max()) for one in expected) > 0.15, "an even look would tell little"
    model = build(family, layers=LAYERS)
    for whose, side, cached in ((model, "left", True), (model, "right", False), (eager, "left", False)):
        scorer = Looking(vectors=vectors)
        given = inputs(family, whose, side=side)  # type: ignore[arg-type]
        with tp.attach(whose, looks(scorer)) as attached:
            logits_of(whose, given, use_cache=cached)
        assert furthest(scorer.seen[0], expected) < TOLERANCE, (side, cached)
        assert attached.report.vision_tokens[:, -1].tolist() == [6, 6]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("cached", [True, False])
def test_it_sees_what_earlier_stages_have_left(family: str, cached: bool) -> None:
    """In each layer the keys that stand there; samples keep different numbers, so that rows are padded."""
    eager = build(family, attention="eager", layers=LAYERS)
    vectors, batch = vectors_of(eager), inputs(family, eager)
    scorer = Looking(vectors=vectors)
    first = Stage(place=2, scorer=NormScorer(), scheduler=FixedScheduler(keep=0.4), name="first")
    model = build(family, layers=LAYERS)
    with tp.attach(model, looks(scorer, first)) as attached, stage_results(attached) as results:
        logits_of(model, batch, use_cache=cached)
    (dropped, _) = reference_stages(attached.report, results)
    assert len(set(attached.report.stages[0].sizes)) > 1
    for row in range(2):
        one = row_inputs(batch, row)
        kept = dropped.kept[row : row + 1]
        kept = kept[:, kept[0] >= 0]
        vision = torch.nn.functional.pad(vision_mask(eager, one["input_ids"]), (0, 1))
        with masked_reference(eager, vision, [(2, kept)]):
            expected = appended(eager, one, vectors, PLACE - 1)
        expected = expected[:, kept[0]] / expected[:, kept[0]].sum(-1, keepdim=True)
        assert furthest(scorer.seen[0][row : row + 1], [expected]) < TOLERANCE


def test_two_stages_look_with_vectors_of_their_own() -> None:
    model, eager = build("llava", layers=LAYERS), build("llava", attention="eager", layers=LAYERS)
    batch = inputs("llava", model)
    one, other = vectors_of(model, seed=1), vectors_of(model, seed=2)
    first, second = Looking(vectors=one), Looking(vectors=other)
    # Behind the first stage, which keeps all but one.
    stages = Stage(place=1, scorer=first, scheduler=FixedScheduler(keep=24), name="first")
    with tp.attach(model, looks(second, stages)):
        logits_of(model, batch)
    assert furthest(first.seen[0], [appended(eager, row_inputs(batch, row), one, 0) for row in range(2)]) < TOLERANCE
    alone = Looking(vectors=one)
    with tp.attach(model, looks(alone, Stage(place=1, scorer=first, scheduler=FixedScheduler(keep=24), name="first"))):
        logits_of(model, batch)
    assert float((second.seen[0] - alone.seen[0]).abs().max()) > 0.01


@pytest.mark.parametrize("mode", ["static", "chunks", "candidates"])
def test_modes_of_a_prefill_look_alike(mode: str) -> None:
    model, eager = build("llava", layers=LAYERS), build("llava", attention="eager", layers=LAYERS)
    vectors, scorer = vectors_of(model), Looking(vectors=vectors_of(model))
    batch = inputs("llava", model)
    expected = [appended(eager, row_inputs(batch, row), vectors, PLACE - 1) for row in range(2)]
    with tp.attach(model, looks(scorer)) as attached:
        if mode == "static":
            generate_logits(model, batch, max_new_tokens=2, cache_implementation="static")
        elif mode == "chunks":
            generate_logits(model, batch, max_new_tokens=2, prefill_chunk_size=11)
        else:  # tokens behind the prompt, as `fit` and prompt lookup have them
            attached.engine.now.limit = batch["input_ids"].shape[1]
            grown = {
                "input_ids": torch.cat([batch["input_ids"], batch["input_ids"][:, -3:]], 1),
                "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1),
            }
            logits_of(model, {**batch, **grown})
    assert len(scorer.seen) == 1
    assert furthest(scorer.seen[0], expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "cohere2_vision"])
def test_a_later_turn_sees_the_earlier_ones(family: str) -> None:
    """On a cache that the first turn has filled, whose stage dropped nothing below its place."""
    model, eager = build(family, layers=LAYERS), build(family, attention="eager", layers=LAYERS)
    vectors = vectors_of(model)
    one = inputs(family, model, rows=[Row(before=3, after=5)])
    second = inputs(family, model, rows=[Row(before=4, after=6)], seed=3)
    along = [name for name in PER_TOKEN if name in one]
    joined = {name: torch.cat([one[name], second[name]], 1 if name in along else 0) for name in one}
    positions = _positions(model, joined)[..., -second["input_ids"].shape[1] :]
    scorer = Looking(vectors=vectors)
    with tp.attach(model, looks(scorer)), torch.no_grad():
        cache = model(**one, use_cache=True)[CACHE]
        later = {**second, "attention_mask": joined["attention_mask"], "position_ids": positions, CACHE: cache}
        model(**later, use_cache=True)
    expected = appended(eager, joined, vectors, PLACE - 1)
    own = int(vision_mask(model, second["input_ids"]).sum())
    expected = expected[:, -own:] / expected[:, -own:].sum(-1, keepdim=True)
    assert furthest(scorer.seen[1], [expected]) < TOLERANCE


def _positions(model: Any, batch: dict[str, Any]) -> Tensor:
    """Position ids that the text model is called with."""
    seen: list[Tensor] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits_of(model, batch)
    handle.remove()
    return seen[0] if seen[0] is not None else torch.arange(batch["input_ids"].shape[1])[None]


def test_keeping_everything_is_bit_identical_and_asks_nothing() -> None:
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    expected = [logits_of(model, batch, use_cache=cached) for cached in (True, False)]
    scorer = Looking(vectors=vectors_of(model))
    before = snapshot(model)
    with tp.attach(model, looks(scorer, keep=1.0)):
        found = [logits_of(model, batch, use_cache=cached) for cached in (True, False)]
    assert all(map(torch.equal, found, expected)) and not scorer.seen
    assert snapshot(model) == before


def test_the_prompt_is_read_as_ever_and_hooks_of_others_see_it_once() -> None:
    """What transformers records, and what hooks on layers see, is the prompt alone; vectors change what is kept."""
    model = build("llava", attention="eager", layers=LAYERS)
    batch = inputs("llava", model)
    seen: list[Any] = []
    handle = model.get_decoder().layers[1].register_forward_hook(lambda *told: seen.append(told[-1].shape))
    with tp.attach(model, looks(Looking(vectors=vectors_of(model)))), torch.no_grad():
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    handle.remove()
    assert len(output.attentions) == LAYERS and len(output.hidden_states) == LAYERS + 1
    assert seen == [(2, batch["input_ids"].shape[1], 64)]
    plain = model(**batch, output_attentions=True)
    assert all(map(torch.equal, output.attentions[:PLACE], plain.attentions[:PLACE]))


def test_threads_look_each_behind_its_own_prompt() -> None:
    model = build("llava", layers=LAYERS)
    batch, vectors = inputs("llava", model), vectors_of(model)
    rows = [row_inputs(batch, row) for row in (0, 1, 0, 1)]

    def scores(attached: Any, row: Any) -> Tensor:
        logits_of(model, row)
        found = attached.report.stages[0].scores
        assert found is not None
        return found

    with tp.attach(model, looks(Looking(vectors=vectors))) as attached:
        alone = [scores(attached, row) for row in rows]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                found = list(pool.map(lambda row: scores(attached, row), rows))
                assert all(map(torch.equal, found, alone))
    assert not torch.equal(alone[0], alone[1])


def test_questions_about_one_picture_do_not_share_its_layers() -> None:
    """Packed evaluation asks such a recipe by generate: the layers below must run with each question."""
    model = build("llava", layers=LAYERS)
    with tp.attach(model, looks(Looking(vectors=vectors_of(model)))) as attached:
        assert not shares_caches(attached)
    plain = Pipeline(
        [Stage(place=PLACE, scorer=NormScorer(), scheduler=FixedScheduler(keep=6))], depth=LAYERS, name="a"
    )
    with tp.attach(model, plain) as attached:
        assert shares_caches(attached)


def test_gradients_reach_the_vectors_and_nothing_else() -> None:
    model = build("llava", layers=LAYERS)
    vectors = vectors_of(model, scale=0.5).requires_grad_(True)
    scorer = Looking(vectors=vectors)
    with tp.attach(model, looks(scorer)):
        model(**inputs("llava", model))
    weight = torch.randn(scorer.seen[0].shape, generator=torch.Generator().manual_seed(0))
    (scorer.seen[0] * weight).sum().backward()
    assert vectors.grad is not None and bool(vectors.grad.isfinite().all())
    assert all(float(grad.abs().sum()) > 0 for grad in vectors.grad[:PLACE])
    assert not vectors.grad[PLACE:].any(), "of later layers"
    loss = lambda given: float((_look(model, given) * weight).sum())  # noqa: E731
    step = torch.zeros_like(vectors)
    step[1, 3] = 1e-3
    slope = (loss(vectors.detach() + step) - loss(vectors.detach() - step)) / 2e-3
    assert slope == pytest.approx(float(vectors.grad[1, 3]), rel=0.02, abs=1e-4)


def _look(model: Any, vectors: Tensor) -> Tensor:
    scorer = Looking(vectors=vectors)
    with tp.attach(model, looks(scorer)):
        logits_of(model, inputs("llava", model))
    return scorer.seen[0]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3_5", "layer 0 is recurrent, whose state"),
        ("gemma4", "layers take per_layer_input of each token"),
        ("molmo2", "its layers have rotary embeddings in several modules"),
        ("ministral3", "scales its queries by their position ids"),
    ],
)
def test_families_that_it_cannot_run_through_are_refused(family: str, why: str) -> None:
    model = build(family, layers=LAYERS)
    with pytest.raises(UnsupportedModelError, match=why):
        tp.attach(model, looks(Looking(vectors=vectors_of(model))))


def test_places_and_modes_without_it_are_refused() -> None:
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    scorer = Looking(vectors=vectors_of(model))
    with pytest.raises(UnsupportedModelError, match="nothing runs before layer 0"):
        tp.attach(model, looks(scorer, place=0))
    with pytest.raises(UnsupportedModelError, match=r"compile: glimpse .* which is not supported in one graph"):
        tp.attach(model, looks(scorer), compile={"backend": "eager"})
    with (
        tp.attach(model, looks(Looking(vectors=vectors_of(model)[:3]))),
        pytest.raises(InputError, match=r"vectors of a glimpse must be \[4 or more, 64\].*got \(3, 64\)"),
    ):
        logits_of(model, batch)
    model.train().gradient_checkpointing_enable()
    with (
        tp.attach(model, looks(scorer)),
        pytest.raises(
            UnsupportedModelError, match=r"LlamaDecoderLayer has stored no keys for a glimpse.*checkpointing"
        ),
    ):
        model(**batch)


def test_masks_without_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.engine import engine
    from tokenprune.engine.forward import Forward

    monkeypatch.setattr(engine, "Forward", lambda **told: Forward(**{**told, "flash": True}))
    model = build("llava", layers=LAYERS)
    with (
        tp.attach(model, looks(Looking(vectors=vectors_of(model)))),
        pytest.raises(UnsupportedModelError, match="not supported on flash and flex attention"),
    ):
        logits_of(model, inputs("llava", model))


def test_who_does_not_declare_it_cannot_ask() -> None:
    made = tp.Tokens.from_hidden(torch.zeros(1, 4, 8), glimpse=lambda vectors: torch.ones(1, 2, 4))
    for reads in (tp.Needs(), tp.Needs(attention="previous", question=True)):
        with pytest.raises(InputError, match=r"scorer 'mine' .*a glimpse behind the prompt.*glimpse=True"):
            made.seen_by(reads, "scorer 'mine'").glimpse(torch.zeros(1, 8))  # type: ignore[misc]
    assert made.seen_by(tp.Needs(glimpse=True), "scorer 'mine'").glimpse is made.glimpse


def test_it_stands_behind_what_an_earlier_stage_has_numbered_anew() -> None:
    eager = build("qwen2_5_vl", attention="eager", layers=LAYERS)
    vectors, one = vectors_of(eager), inputs("qwen2_5_vl", eager, rows=[Row(before=3, after=9)])
    scorer = Looking(vectors=vectors)
    first = Stage(place=2, scorer=NormScorer(), scheduler=FixedScheduler(keep=10), positions="renumber", name="first")
    model = build("qwen2_5_vl", layers=LAYERS)
    with tp.attach(model, looks(scorer, first)) as attached, stage_results(attached) as results:
        logits_of(model, one)
    kept = reference_stages(attached.report, results)[0].kept
    vision, mask = (torch.nn.functional.pad(x, (0, 1), value=last) for x, last in (
        (vision_mask(eager, one["input_ids"]), False), (one["attention_mask"], 1)))  # fmt: skip
    with masked_reference(eager, vision, [(2, kept)]), numbered_through(eager, vision, mask, [(2, kept)]):
        expected = appended(eager, one, vectors, PLACE - 1)
    expected = expected[:, kept[0]] / expected[:, kept[0]].sum(-1, keepdim=True)
    assert furthest(scorer.seen[0], [expected]) < TOLERANCE
    with masked_reference(eager, vision, [(2, kept)]):
        apart = appended(eager, one, vectors, PLACE - 1)[:, kept[0]]
    assert furthest(scorer.seen[0], [apart / apart.sum(-1, keepdim=True)]) > 100 * TOLERANCE, "numbers must matter"
