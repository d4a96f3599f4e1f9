"""Signals of the vision tower, recorded beside SDPA: those of the model's own eager attention, laid out as its own
projector lays them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, row_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from towers import KINDS, TOWERS, Weights, by_sample, makeup, reading

import tokenprune as tp
from tokenprune.core.needs import Needs, tower_signal
from tokenprune.cost.account import account
from tokenprune.engine.tower_attention import BlockCall
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.catalogue import adapters
from tokenprune.families.shape import model_shape
from tokenprune.families.tower import PROVED, projections_of
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.baseline import RasterScorer
from tokenprune.stage import Stage

TOLERANCE = 1e-5


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("family", TOWERS)
def test_they_are_those_of_eager_attention(family: str) -> None:
    """Of every block, windows and full ones; of every picture, tiles, ragged batches; as the model's own projector puts
    patches together."""
    eager, model = build(family, attention="eager"), build(family)
    batch = inputs(family, model)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    weights = Weights(tower)
    with weights.recorded(), torch.no_grad():
        eager(**batch)
    made_of = makeup(eager, tower, batch)
    assert set(made_of.count_nonzero(1).tolist()) <= {0, tower.side**2}
    names = [tower_signal("received_attention", b) for b in range(tower.depth)]
    names += [tower_signal("class_attention", b) for b in range(tower.depth)] if tower.class_token else []
    stage = reading(*names)
    with tp.attach(model, tp.Pipeline([stage])), torch.no_grad():
        model(**batch)
    scorer: Any = stage.scorer
    assert set(scorer.got) == set(names)
    for name in names:
        signal, _, block = name.partition("@")
        b = int(block)
        expected = weights.class_row(b) if signal == "class_attention" else weights.received(b, batch)
        assert expected.std() > 1e-4
        for row, own in enumerate(by_sample(model, batch, made_of @ expected)):
            assert (scorer.got[name][row, : len(own)] - own).abs().max() < TOLERANCE, name


def test_an_attention_that_names_no_scale_has_the_usual_one() -> None:
    attention = torch.nn.Module()
    attention.num_heads = 2  # type: ignore[assignment]
    call = BlockCall(attention, {}, {"q": torch.zeros(1, 3, 32)})
    assert call.scale == 16**-0.5
    attention.scaling = 0.3  # type: ignore[assignment]
    assert call.scale == 0.3


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
def test_keys_and_hidden_states_are_those_of_the_block(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    tower = anatomy(model).adapter.tower_parts(model.base_model)
    attention: Any = tower.attentions[0]
    (*_, key) = projections_of(attention) or ()
    normed = isinstance(getattr(attention, "k_norm", None), torch.nn.Module)  # GLM-OCR
    key, fused = ("k_norm", False) if normed else (key, "qkv" in key)
    seen: dict[str, Tensor] = {}

    def leaves(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output})

    handles = [
        getattr(attention, key).register_forward_hook(leaves("keys@0")),
        tower.blocks[1].register_forward_hook(leaves("hidden@1")),
    ]
    stage = reading("keys@0", "hidden@1", "keys")
    with tp.attach(model, tp.Pipeline([stage])), torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    made_of = makeup(model, tower, batch)
    scorer: Any = stage.scorer
    assert scorer.got["keys"].shape[2:] == (2, 16)
    for name, output in seen.items():
        rows = output.chunk(3, -1)[1] if fused and name == "keys@0" else output
        rows = rows.flatten(-2) if rows.shape[-2:] == (2, 16) else rows
        rows = rows if rows.dim() == 2 else rows[:, tower.prefix :].flatten(0, 1)
        for row, own in enumerate(by_sample(model, batch, made_of @ rows)):
            assert torch.allclose(scorer.got[name][row, : len(own)].flatten(1), own, atol=TOLERANCE, rtol=1e-5)


def test_attention_adds_up() -> None:
    """The class token looks at itself too; received attention is 1/n on average, and its patches have nearly all."""
    model = build("llava")
    stage = reading("class_attention", "received_attention")
    with tp.attach(model, tp.Pipeline([stage])), torch.no_grad():
        model(**inputs("llava", model))
    scorer: Any = stage.scorer
    row = scorer.got["class_attention"][0, :25].sum()
    assert 0 < row < 1
    assert 0.5 < scorer.got["received_attention"][0, :25].sum() <= 1 + 1e-6


def test_blocks_of_bounded_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.engine import tower_attention

    results = []
    for at_once in (2**22, 300, 1):
        monkeypatch.setattr(tower_attention, "AT_ONCE", at_once)
        for family in ("llava_next", "qwen2_5_vl"):
            model, stage = build(family), reading("received_attention", "received_attention@0")
            with tp.attach(model, tp.Pipeline([stage])), torch.no_grad():
                model(**inputs(family, model))
            scorer: Any = stage.scorer
            results.append(scorer.got)
    for other in results[2:]:
        same = results[0] if other["received_attention"].shape == results[0]["received_attention"].shape else results[1]
        for name, value in other.items():
            assert torch.allclose(value, same[name], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_i_of_a_batch_is_sample_i_alone(family: str) -> None:
    model, stage = build(family), reading("class_attention", "keys")
    batch = inputs(family, model)
    scorer: Any = stage.scorer
    with tp.attach(model, tp.Pipeline([stage])) as attached, torch.no_grad():
        model(**batch)
        together, kept = scorer.got, attached.report.stages[0].kept
        for row in range(2):
            model(**row_inputs(batch, row))
            alone = scorer.got
            for name, value in alone.items():
                assert torch.allclose(together[name][row, : value.shape[1]], value[0], atol=TOLERANCE)
            assert kept[row][kept[row] >= 0].tolist() == attached.report.stages[0].kept[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_follow_tokens_to_later_layers(family: str) -> None:
    """Behind a stage that has dropped tokens, each token still has its own row."""
    model = build(family)
    first = Stage(place="after_vision", scheduler=FixedScheduler(keep=0.5), scorer=RasterScorer())
    before, later = reading("class_attention", "hidden@0"), reading("class_attention", "hidden@0", place=4, keep=0.25)
    batch = inputs(family, model)
    with torch.no_grad():
        with tp.attach(model, tp.Pipeline([before])):
            model(**batch)
        with tp.attach(model, tp.Pipeline([first, later])):
            model(**batch)
    all_, left = before.scorer, later.scorer
    assert left.seen.hidden.shape[1] < all_.seen.hidden.shape[1]
    for name in left.names:
        for row, size in enumerate(left.seen.sizes):
            origin = left.seen.origin[row, :size]
            assert torch.equal(left.got[name][row, :size], all_.got[name][row, origin])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_generate_reads_the_pictures_that_it_encoded(family: str, options: dict[str, Any]) -> None:
    """`generate` runs the tower before the prompt, once; rows of beams share their sample's picture."""
    model, stage = build(family), reading("class_attention")
    batch = inputs(family, model)
    scorer: Any = stage.scorer
    with tp.attach(model, tp.Pipeline([stage])) as attached, torch.no_grad():
        model(**batch)
        expected, kept = scorer.got["class_attention"], attached.report.stages[0].kept
        model.generate(**batch, max_new_tokens=3, do_sample=False, **options)
        copies = options.get("num_beams", 1)
        assert torch.equal(scorer.got["class_attention"], expected.repeat_interleave(copies, 0))
        assert torch.equal(attached.report.stages[0].kept, kept.repeat_interleave(copies, 0))
        assert not attached.engine.now.tower.runs


def test_a_tower_without_class_token_is_told_in_the_report() -> None:
    model, stage = build("qwen2_5_vl"), reading("class_attention", "received_attention")
    with tp.attach(model, tp.Pipeline([stage])) as attached, torch.no_grad():
        model(**inputs("qwen2_5_vl", model))
    scorer: Any = stage.scorer
    assert torch.equal(scorer.got["class_attention"], scorer.got["received_attention"])
    (note,) = attached.report.notes
    assert note.startswith("class_attention: ") and "received_attention of block 2 stands in" in note
    assert f"note: {note}" in str(attached.report) and attached.report.to_dict()["notes"] == [note]
    with tp.attach(build("llava"), tp.Pipeline([reading("class_attention")])) as attached:
        assert attached.report.notes == ()


def test_nothing_is_hooked_where_nobody_reads() -> None:
    model = build("llava")
    tower = model.base_model.vision_tower

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tower.modules())

    untouched = hooks()
    with tp.attach(model, "random"):
        assert hooks() == untouched
    with tp.attach(model, tp.Pipeline([reading("class_attention@0")])) as attached:
        assert hooks() > untouched and attached.engine.tower.blocks_read == {0}
    assert hooks() == untouched


def test_names_choose_blocks() -> None:
    model = build("llava")  # 3 blocks, of which the projector reads up to the last but one
    names = {"keys": 1, "keys@0": 0, "keys@-1": 2, "keys@1/3": 1, "keys@99%": 2}
    for name, block in names.items():
        with tp.attach(model, tp.Pipeline([reading(name)])) as attached:
            assert attached.engine.tower.blocks_read == {block}
    with pytest.raises(UnsupportedModelError, match=r"'keys@3': block 3, but CLIPVisionModel has 3 blocks; .* 0 … 2"):
        tp.attach(model, tp.Pipeline([reading("keys@3")]))
    for wrong in ("keys@", "keys@x", "keys@1.5", "key@1", "@1", "keys@-"):
        with pytest.raises(RecipeError, match=r"Needs\(tower="):
            Needs(tower=wrong)
    with pytest.raises(RecipeError, match="did you mean 'keys'"):
        Needs(tower="key@1")


def test_pictures_that_the_tower_has_not_seen_are_refused() -> None:
    """Features made beforehand may be of any picture: nothing that was recorded is taken to be theirs."""
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    with tp.attach(model, tp.Pipeline([reading("class_attention")])), torch.no_grad():
        model(**batch)
        features = model.base_model.get_image_features(batch["pixel_values"])
        with pytest.raises(InputError, match="class_attention: the vision tower has not run for this prompt"):
            model(input_ids=batch["input_ids"], mm_encoder_outputs={"image": features})
        model(**batch)


def test_half_precision() -> None:
    model, stage = build("llava").bfloat16(), reading("class_attention", "received_attention", "keys", "hidden")
    batch = inputs("llava", model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with tp.attach(model, tp.Pipeline([stage])), torch.no_grad():
        model(**batch)
    scorer: Any = stage.scorer
    kinds = {name: value.dtype for name, value in scorer.got.items()}
    assert kinds["class_attention"] == kinds["received_attention"] == torch.float32
    assert kinds["keys"] == kinds["hidden"] == torch.bfloat16


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["class_attention", "received_attention@0", "keys", "hidden@0"])
@torch.no_grad()
def test_the_ledger_counts_what_is_computed(family: str, name: str) -> None:
    """PyTorch's counter, with the signal and without."""
    model = build(family, attention="eager")
    batch = inputs(family, model, rows=[Row()])

    def counted(stage: Stage) -> tuple[int, Any]:
        with tp.attach(model, tp.Pipeline([stage])) as attached, FlopCounterMode(display=False) as counter:
            model(**batch)
        return counter.get_total_flops() // 2, attached.report

    without, _ = counted(Stage(place="after_vision", scheduler=FixedScheduler(keep=0.5), scorer=RasterScorer()))
    with_it, report = counted(reading(name))
    total, grids = report.total[0], report.grids[0]
    pipeline = tp.Pipeline([reading(name), reading(name, place=3, keep=0.2)])
    own = account(model_shape(model), pipeline, total=total, grids=grids, text=10).reduced.stages
    assert with_it - without == own[0].parts.get("tower", 0)
    assert (own[0].parts.get("tower", 0) > 0) == name.endswith(("attention", "attention@0"))
    assert "tower" not in own[1].parts  # recorded once


def test_a_recipe_that_keeps_all_records_nothing() -> None:
    model, stage = build("llava"), reading("class_attention", keep=1.0)
    batch = inputs("llava", model)
    with torch.no_grad():
        untouched = model(**batch).logits
        with tp.attach(model, tp.Pipeline([stage])), FlopCounterMode(display=False) as counter:
            assert torch.equal(model(**batch).logits, untouched)
        with FlopCounterMode(display=False) as plain:
            model(**batch)
    assert counter.get_total_flops() == plain.get_total_flops()
    scorer: Any = stage.scorer
    assert not scorer.got


def test_every_family_is_proved_or_refused_by_name() -> None:
    """A family whose vision tokens are learned queries, or that nobody has tried, says so."""
    assert {*PROVED} < {*adapters()}
    for family in ("idefics2", "aria"):
        with pytest.raises(UnsupportedModelError, match=r"belongs to no vision token: each is a learned query"):
            tp.attach(build(family), tp.Pipeline([reading("keys")]))
    for family in {*adapters()} - {*PROVED, "idefics2", "aria"}:
        with pytest.raises(UnsupportedModelError, match="is not read yet: how its patches become vision tokens"):
            tp.attach(build(family), tp.Pipeline([reading("keys")]))
