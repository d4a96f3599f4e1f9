"""Stages inside the vision tower of every family: the masked reference of tower and decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import Double, doubled
from families import FAMILIES, MODELS, Row, build, inputs, row_inputs, vision_mask
from family_models.tiny import VIDEO, VISION_END, VISION_START
from hidden_patches import differences, exact, gone_of, hidden_patches, inside
from pruned import TOLERANCE, worst
from reference import Stage as Hidden
from reference import generate_logits, masked_reference, pruned_difference
from torch import nn
from towers import KINDS

import tokenprune as tp
from tokenprune.core.place import Place
from tokenprune.engine.calls import takes
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.parts.rectifiers.mass import LogMassRectifier
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.stage import Stage


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_equals_the_masked_reference(family: str, attention: Any) -> None:
    """In float32 what is left is rounding: as much as between the untouched model's own kernels, some 3e-6.

    All families are exact in float64: `abilities.inside_the_tower`.
    """
    model, eager = build(family, attention=attention), build(family, attention="eager")
    difference, without = differences(model, eager, inputs(family, model))
    assert difference < TOLERANCE < without / 100


@torch.no_grad()
def test_tiles_with_hidden_patches() -> None:
    """SmolVLM's tower masks what pads a tile; a stage gathers that mask."""
    model, eager = (exact("smolvlm", attention) for attention in ("sdpa", "eager"))
    batch = doubled(inputs("smolvlm", model))
    pixels = batch["pixel_values"]
    shown = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.bool)
    shown[0, 0, 16:], shown[1, 1, :, 12:] = False, False
    with Double():
        difference, without = differences(model, eager, {**batch, "pixel_attention_mask": shown})
        unmasked, _ = differences(model, eager, batch)
        assert not torch.equal(model(**batch).logits, model(**batch, pixel_attention_mask=shown).logits)
    assert max(difference, unmasked) < 1e-12 < without / 1e9


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_frames_of_a_video(family: str) -> None:
    """Three frames of one grid, which see themselves alone in the tower; a stage counts over all of them."""
    model, eager = (exact(family, attention) for attention in ("sdpa", "eager"))
    ids = torch.tensor([[1, 5, VISION_START, *[VIDEO] * 48, VISION_END, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": torch.randn(3 * 64, 96, generator=torch.Generator().manual_seed(0)).double(),
        "video_grid_thw": torch.tensor([[3, 8, 8]]),
    }
    with Double():
        difference, without = differences(model, eager, batch)
    assert difference < 1e-12 < without / 1e9


class Merging:
    """What one stage that merges did, from its plan alone, written into the tower of another model."""

    def __init__(self, attached: Any, block: int) -> None:
        self.reduction = attached.engine.now.tower.runs[0].reduction
        (self.level,) = self.reduction.levels
        (gone,) = self.reduction.gone.values()
        self.gone = {block: gone[:, 0]}
        self.bias = {block: gone[:, 1].log()}
        """Of a patch that stands for several."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the block: new states of the targets, patch by patch of what will be one vision token."""
        hidden, tower = args[0] if args else kwargs["hidden_states"], self.reduction.tower
        patches = (hidden if hidden.dim() == 2 else hidden[:, tower.prefix :].flatten(0, 1)).clone()
        plan, before = self.level.plan, patches.clone()
        for row in range(len(self.level.slot)):
            units = self.reduction.units[self.level.slot[row]]
            for target, weights in zip(plan.target[row].tolist(), plan.weight[row], strict=True):
                if target >= 0:
                    own = [(int(plan.source[row, i]), float(w)) for i, w in enumerate(weights) if w > 0]
                    total = sum(weight * before[units[source]] for source, weight in own)
                    patches[units[target]] = total / sum(weight for _, weight in own)
        if hidden.dim() == 3:
            patches = torch.cat([hidden[:, : tower.prefix], patches.unflatten(0, (len(hidden), -1))], 1)
        return ((patches, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": patches})


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_a_merge_equals_the_masked_reference(family: str) -> None:
    """Attention weighed by mass where the tower's takes a mask. In float64, but for merged states: those are summed in
    float32."""
    model, eager = (exact(family, attention) for attention in ("sdpa", "eager"))
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    weighed = takes(tower.attentions[0], "attention_mask")
    parts = {"recycler": ClusterRecycler(share=0.6, per_cluster=3)}
    stage = inside(1, 0.4, **parts, rectifier=LogMassRectifier() if weighed else None)
    batch = doubled(inputs(family, model))
    with Double(), tp.attach(model, tp.Pipeline([stage])) as attached:
        reduced = model(**batch).logits
        merging = Merging(attached, 1)
        left = attached.report.stages[0].left
    assert merging.bias[1].max() > 0.5
    vision = vision_mask(model, batch["input_ids"])
    handle = tower.blocks[1].register_forward_pre_hook(merging, with_kwargs=True)
    results = []
    for bias in (merging.bias if weighed else None, None if weighed else merging.bias):
        with (
            Double(),
            masked_reference(eager, vision, [Hidden(0, left)]),
            hidden_patches(tower, merging.gone, bias),
        ):
            reference = eager(**batch).logits
        results.append(pruned_difference(reduced, reference, vision, batch["attention_mask"], left))
    handle.remove()
    assert results[0] < TOLERANCE < results[1] / 100


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_generate_is_that_of_the_masked_reference(family: str) -> None:
    model, eager = (exact(family, attention) for attention in ("sdpa", "eager"))
    rows = None if MODELS[family].expands else [Row(), Row(after=9)]
    batch = doubled(inputs(family, model, rows=rows))
    with Double(), tp.attach(model, tp.Pipeline([inside(1)])) as attached:
        model(**batch)
        gone, kept = gone_of(attached), attached.report.stages[0].kept
        sequences, logits = generate_logits(model, batch, max_new_tokens=3)
        beams, _ = generate_logits(model, batch, max_new_tokens=3, num_beams=2)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    with Double(), masked_reference(eager, vision_mask(eager, batch["input_ids"]), [Hidden(0, kept)]):
        with hidden_patches(tower, gone):
            expected, reference = generate_logits(eager, batch, max_new_tokens=3)
        with hidden_patches(tower, gone):
            expected_beams, _ = generate_logits(eager, batch, max_new_tokens=3, num_beams=2)
    assert torch.equal(sequences, expected) and torch.equal(beams, expected_beams)
    assert worst(logits, reference) < 1e-12


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_keeping_all_is_bit_identical_and_detach_leaves_no_trace(family: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    untouched = model(**batch).logits
    with tp.attach(model, tp.Pipeline([inside(1, 1.0)])):
        assert torch.equal(model(**batch).logits, untouched)
    with tp.attach(model, tp.Pipeline([inside(1, 0.5)])):
        assert model(**batch).logits.shape[1] < untouched.shape[1]
    assert torch.equal(model(**batch).logits, untouched)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with tp.attach(model, tp.Pipeline([inside(1, 0.5)])):
        pass
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", [*FAMILIES, *KINDS])
@pytest.mark.parametrize("recycler", [None, ClusterRecycler(share=0.6, per_cluster=3)], ids=["drop", "cluster"])
@torch.no_grad()
def test_row_i_of_a_batch_is_sample_i_alone(family: str, recycler: Any) -> None:
    model = build(family, layers=4)
    batch = inputs(family, model)
    parts = {} if recycler is None else {"recycler": recycler}
    with tp.attach(model, tp.Pipeline([inside(1, 0.4, **parts)])) as attached:
        # by `generate`, which counts positions without padding (Ministral 3 scales queries by them)
        together = generate_logits(model, batch, max_new_tokens=1)[1][0]
        left = attached.report.stages[0].left
        for row in range(2):
            alone = generate_logits(model, row_inputs(batch, row), max_new_tokens=1)[1][0]
            assert left[row][left[row] >= 0].tolist() == attached.report.stages[0].left[0].tolist()
            assert (together[row] - alone[0]).abs().max() < TOLERANCE


def test_what_cannot_be_is_refused_by_name() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match=r"in_vision: block 7\): block 7, but CLIPVisionModel has 3 blocks"):
        tp.attach(model, tp.Pipeline([inside(7)]))
    adaptive = Stage(place=Place("in_vision", 1), scheduler=RankRatioScheduler(), scorer=NormScorer())
    with pytest.raises(UnsupportedModelError, match="counts by scores"):
        tp.attach(model, tp.Pipeline([adaptive]))
    with pytest.raises(UnsupportedModelError, match="takes no mask, so no bias"):
        tp.attach(build("qwen2_vl"), tp.Pipeline([inside(1, rectifier=LogMassRectifier())]))
    with pytest.raises(UnsupportedModelError, match="compile: stages inside the vision tower"):
        tp.attach(model, tp.Pipeline([inside(1)]), compile={"backend": "eager"})
    batch = inputs("llava", model, rows=[Row()])
    with tp.attach(model, tp.Pipeline([inside(1)])), torch.no_grad():
        features = model.base_model.get_image_features(batch["pixel_values"])
        with pytest.raises(InputError, match="the vision tower has not run for this prompt"):
            model(input_ids=batch["input_ids"], mm_encoder_outputs={"image": features})
