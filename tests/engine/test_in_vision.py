"""Stages inside the vision tower: the masked reference of the tower, every family; plain vision transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as tf
from double import Double, doubled
from families import FAMILIES, Row, build, inputs, row_inputs, vision_mask
from pruned import TOLERANCE
from reference import Stage as Hidden
from reference import generate_logits, masked_reference, pruned_difference
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.core.place import Place
from tokenprune.errors import InputError, NotFiredError, UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.tower import Tower, find_tower
from tokenprune.parts.rectifiers.mass import LogMassRectifier
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.schedulers.rank import RankRatioScheduler
from tokenprune.parts.scorers.baseline import RandomScorer
from tokenprune.parts.scorers.features import NormScorer
from tokenprune.stage import Stage


def inside(block: int, keep: float = 0.5, **parts: Any) -> Stage:
    parts = {"scorer": NormScorer(), "sampler": TopKSampler(), **parts}
    return Stage(place=Place("in_vision", block), scheduler=FixedScheduler(keep=keep), **parts)


def later(layer: int, keep: float) -> Stage:
    return Stage(place=layer, scheduler=FixedScheduler(keep=keep), scorer=NormScorer(), name=f"before_{layer}")


@contextmanager
def hidden_patches(tower: Tower, gone: dict[int, Tensor], bias: dict[int, Tensor] | None = None) -> Iterator[None]:
    """Eager attention of a tower in which, from each block on, patches ``[patches]`` of that block are seen by nobody.

    Nothing is dropped: their rows run on. `bias` is added to the keys, ``[patches]``.
    """
    module = sys.modules[type(tower.attentions[0]).__module__]
    original, place = module.eager_attention_forward, {id(a): i for i, a in enumerate(tower.attentions)}
    at: dict[int, int] = {}

    def masked(attention: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = place.get(id(attention))
        if block is None:
            return original(attention, query, key, value, *args, **kwargs)
        rows, n = key.shape[0], key.shape[2]
        start = at.get(block, 0)
        added = torch.zeros(rows, n)
        for first, dropped in gone.items():
            if block >= first:
                own = dropped[start : start + rows * (n - tower.prefix)].view(rows, -1).bool()
                added[:, tower.prefix :] = added[:, tower.prefix :].masked_fill(own, -1e30)
        for first, extra in (bias or {}).items():
            if block >= first:
                added[:, tower.prefix :] += extra[start : start + rows * (n - tower.prefix)].view(rows, -1)
        at[block] = start + rows * (n - tower.prefix)
        # Where all of a stretch are gone they see each other evenly, which nobody reads.
        kwargs.pop("attention_mask", None)
        return original(attention, query, key, value, added[:, None, None], *args[1:], **kwargs)

    with patch.object(module, "eager_attention_forward", masked):
        yield


def gone_of(attached: Any) -> dict[int, Tensor]:
    """By block, the patches that the stages of the last run have dropped."""
    stages = attached.engine.tower.stages
    reduction = attached.engine.now.tower.runs[0].reduction
    return {block: reduction.gone[numbers[-1]][:, 0] for block, numbers in stages.at.items()}


def differences(model: Any, eager: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Two stages in the tower, one in the decoder behind them: how far the logits are from the reference.

    First of one whose tower and decoder hide what is gone, then of one whose decoder alone does.
    """
    stages = [inside(1, 0.8), inside(2, 0.5), later(3, 0.2)]
    if anatomy(model).adapter.tower_parts(model.base_model).last == 1:
        stages = [inside(0, 0.8), inside(1, 0.5), later(3, 0.2)]
    with tp.attach(model, tp.Pipeline(stages)) as attached:
        reduced = model(**batch).logits
        report, gone = attached.report, gone_of(attached)
    assert [stage.layer for stage in report.stages] == [None, None, 3]
    vision = vision_mask(model, batch["input_ids"])
    kept = [stage.kept for stage in report.stages]
    assert max(report.stages[0].sizes) > max(report.stages[1].sizes) > max(report.stages[2].sizes)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    hidden = [Hidden(0, kept[1]), Hidden(3, kept[2])]
    with masked_reference(eager, vision, hidden):
        with hidden_patches(tower, gone):
            reference = eager(**batch).logits
        without = eager(**batch).logits
    compared = vision, batch["attention_mask"], kept[2]
    return pruned_difference(reduced, reference, *compared), pruned_difference(reduced, without, *compared)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_equals_the_masked_reference(family: str, attention: Any) -> None:
    model, eager = build(family, attention=attention), build(family, attention="eager")
    difference, without = differences(model, eager, inputs(family, model))
    assert difference < TOLERANCE < without / 100


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_float64_it_is_exact(family: str) -> None:
    """So what is left in float32 is rounding: as much as between the untouched model's own kernels, some 3e-6."""
    model, eager = build(family).double(), build(family, attention="eager").double()
    with Double():
        difference, without = differences(model, eager, doubled(inputs(family, model)))
    assert difference < 1e-12 < without / 1e9


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate_is_that_of_the_masked_reference(family: str) -> None:
    model, eager = build(family), build(family, attention="eager")
    batch = inputs(family, model)
    with tp.attach(model, tp.Pipeline([inside(1)])) as attached:
        model(**batch)
        gone, kept = gone_of(attached), attached.report.stages[0].kept
        sequences, logits = generate_logits(model, batch)
        beams, _ = generate_logits(model, batch, num_beams=2)
    tower = anatomy(eager).adapter.tower_parts(eager.base_model)
    with masked_reference(eager, vision_mask(eager, batch["input_ids"]), [Hidden(0, kept)]):
        with hidden_patches(tower, gone):
            expected, reference = generate_logits(eager, batch)
        with hidden_patches(tower, gone):
            expected_beams, _ = generate_logits(eager, batch, num_beams=2)
    assert torch.equal(sequences, expected) and torch.equal(beams, expected_beams)
    worst = max((a - b).abs().max().item() for a, b in zip(logits, reference, strict=True))
    assert worst < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recycler", [None, ClusterRecycler(share=0.6, per_cluster=3)], ids=["drop", "cluster"])
@torch.no_grad()
def test_row_i_of_a_batch_is_sample_i_alone(family: str, recycler: Any) -> None:
    model = build(family)
    batch = inputs(family, model)
    parts = {} if recycler is None else {"recycler": recycler}
    with tp.attach(model, tp.Pipeline([inside(1, 0.4, **parts)])) as attached:
        together = model(**batch).logits
        left = attached.report.stages[0].left
        for row in range(2):
            alone = model(**row_inputs(batch, row)).logits
            assert left[row][left[row] >= 0].tolist() == attached.report.stages[0].left[0].tolist()
            assert (together[row, -1] - alone[0, -1]).abs().max() < TOLERANCE


KINDS: dict[str, Any] = {
    "vit": (tf.ViTForImageClassification, tf.ViTConfig),
    "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config),
    "siglip": (tf.SiglipVisionModel, tf.SiglipVisionConfig),
    "clip": (tf.CLIPVisionModel, tf.CLIPVisionConfig),
    "internvit": (tf.InternVLVisionModel, tf.InternVLVisionConfig),
}


def plain(kind: str, attention: str = "sdpa") -> Any:
    model_class, config_class = KINDS[kind]
    sizes = ([24, 24], [4, 4]) if kind == "internvit" else (24, 4)
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=sizes[0],
        patch_size=sizes[1],
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=attention)
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.dim() > 1 else 0.1) + (weight.dim() == 1) * 0.7)
    return model.eval()


def pixels(kind: str) -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def output_of(model: Any, batch: Tensor) -> Tensor:
    output = model(batch)
    return output.logits if "logits" in output else output.last_hidden_state


def rows_left(attached: Any, tower: Tower, block: int) -> Tensor:
    """``[R, prefix + P]`` bool: rows that the blocks behind the stages run on."""
    gone = attached._run.reduction.gone[max(attached._run.reduction.gone)][:, 0].view(3, -1)
    return torch.nn.functional.pad(gone == 0, (tower.prefix, 0), value=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rectifier", [None, LogMassRectifier()], ids=["", "log_mass"])
@torch.no_grad()
def test_a_plain_tower_equals_the_masked_reference(kind: str, attention: str, rectifier: Any) -> None:
    """Merged states come from the run itself; from there on, nobody sees what is gone, and mass weighs the keys."""
    model, eager = plain(kind, attention), plain(kind, "eager")
    base, reference = (m if not hasattr(m, "base_model") else m.base_model for m in (model, eager))
    tower, other = find_tower(base), find_tower(reference)
    entered: dict[int, Tensor] = {}
    stage = inside(1, 0.4, recycler=ClusterRecycler(share=0.6, per_cluster=3), rectifier=rectifier)
    with tp.attach_vision(base, tp.Pipeline([stage])) as attached:
        watch = tower.blocks[1].register_forward_hook(lambda m, args, output: entered.update(out=output))
        reduced = base(pixels(kind)).last_hidden_state
        watch.remove()
        reduction: Any = attached._run.reduction  # type: ignore[union-attr]
    level, tokens = reduction.levels[0], reduction.tokens
    flat, bias = {1: reduction.gone[0][:, 0]}, None
    if rectifier is not None:
        biases = torch.zeros(len(reduction.units)).index_put((tokens.slot.flatten(),), tokens.bias.flatten())
        assert biases.max() > 0.5
        bias = {1: biases}
    merged = tokens.hidden

    def write(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        patches = hidden[:, other.prefix :].flatten(0, 1).clone()
        patches[tokens.slot.flatten()] = merged.flatten(0, 1)
        hidden = torch.cat([hidden[:, : other.prefix], patches.unflatten(0, (3, -1))], 1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = other.blocks[1].register_forward_pre_hook(write, with_kwargs=True)
    with hidden_patches(other, flat, bias):
        expected = reference(pixels(kind)).last_hidden_state
    handle.remove()
    there = rows_left(attached, tower, 1)
    assert level.plan is not None
    assert (reduced[there] - expected[there]).abs().max() < TOLERANCE
    # a merged patch has what its target has become
    shares = level.plan.shares.mT
    for row in range(3):
        source = level.plan.source[row]
        for place, share in zip(source.tolist(), shares[row], strict=True):
            if place >= 0 and share.max() == 1.0:
                target = int(level.plan.target[row, share.argmax()])
                one, two = reduced[row, tower.prefix + place], reduced[row, tower.prefix + target]
                assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_dropped_patch_keeps_its_state(kind: str) -> None:
    """Dense prediction: the output has every patch, at its place."""
    model = plain(kind)
    base = model.base_model if hasattr(model, "base_model") else model
    tower = find_tower(base)
    untouched = output_of(model, pixels(kind))
    states: dict[str, Tensor] = {}
    handles = [
        tower.blocks[1].register_forward_hook(lambda m, args, output: states.update(before=output)),
        tower.blocks[3].register_forward_hook(lambda m, args, output: states.update(last=output)),
    ]
    with tp.attach_vision(base, tp.Pipeline([inside(2, 0.25)])) as attached:
        reduced = output_of(model, pixels(kind))
    for handle in handles:
        handle.remove()
    there = rows_left(attached, tower, 2)
    assert attached.stages[0].sizes == (len(there[0]) // 4,) * 3
    assert torch.equal(states["last"][~there], states["before"][~there])
    assert reduced.shape == untouched.shape and not torch.equal(reduced, untouched)
    with tp.attach_vision(base, tp.Pipeline([inside(2, 1.0)])):
        assert torch.equal(output_of(model, pixels(kind)), untouched)
    assert torch.equal(output_of(model, pixels(kind)), untouched)


def test_blocks_run_on_fewer_patches() -> None:
    """Recorded hidden states have every patch; the blocks themselves have not."""
    model = plain("clip")
    lengths: list[int] = []
    for block in model.encoder.layers:
        block.mlp.register_forward_hook(lambda m, args, output: lengths.append(output.shape[1]))
    with tp.attach_vision(model, tp.Pipeline([inside(1, 18), inside(3, 0.25)])), torch.no_grad():
        output = model(pixels("clip"), output_hidden_states=True)
    assert lengths == [37, 19, 19, 10]
    assert [state.shape[1] for state in output.hidden_states] == [37] * 5


class OwnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.embed, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.ModuleList(OwnBlock(16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_a_transformer_of_ones_own() -> None:
    """Attention without other patches is what its blocks give on the rows that are left."""
    model, batch = OwnViT().eval(), torch.randn(2, 3, 24, 24)
    with tp.attach_vision(model, tp.Pipeline([inside(1, 9, scorer=RandomScorer())])) as attached:
        reduced = model(batch)
    for row, kept in enumerate(attached.stages[0].kept):
        rows = [0, *(kept + 1).tolist()]
        x = torch.cat([model.cls_token, model.embed(batch[row : row + 1]).flatten(2).mT], 1)
        x = model.blocks[0](x)[:, rows]
        for block in model.blocks[1:]:
            x = block(x)
        assert (reduced[row, rows] - x[0]).abs().max() < 1e-6


def test_what_cannot_be_is_refused_by_name() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match=r"in_vision: block 7\): block 7, but CLIPVisionModel has 3 blocks"):
        tp.attach(model, tp.Pipeline([inside(7)]))
    adaptive = Stage(place=Place("in_vision", 1), scheduler=RankRatioScheduler(), scorer=NormScorer())
    with pytest.raises(UnsupportedModelError, match="counts by scores"):
        tp.attach(model, tp.Pipeline([adaptive]))
    with pytest.raises(UnsupportedModelError, match="takes no mask, so no bias"):
        tp.attach(build("qwen2_vl"), tp.Pipeline([inside(1, rectifier=LogMassRectifier())]))
    with pytest.raises(UnsupportedModelError, match="budget for a recipe with stages inside"):
        tp.attach(model, tp.Pipeline([inside(1)], budget=tp.Budget("keep", 0.5)))
    with pytest.raises(UnsupportedModelError, match="compile: stages inside the vision tower"):
        tp.attach(model, tp.Pipeline([inside(1)]), compile={"backend": "eager"})
    with pytest.raises(UnsupportedModelError, match="there is no language model"):
        tp.attach_vision(plain("clip"), tp.Pipeline([later(1, 0.5)]))
    attached = tp.attach_vision(plain("clip"), tp.Pipeline([inside(1)]))
    with pytest.raises(NotFiredError, match="no picture has come through"):
        _ = attached.stages
    batch = inputs("llava", model, rows=[Row()])
    with tp.attach(model, tp.Pipeline([inside(1)])), torch.no_grad():
        features = model.base_model.get_image_features(batch["pixel_values"])
        with pytest.raises(InputError, match="the vision tower has not run for this prompt"):
            model(input_ids=batch["input_ids"], mm_encoder_outputs={"image": features})
