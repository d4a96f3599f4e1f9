"""Stages inside plain vision transformers, without a language model: the masked reference, merges, dense outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from hidden_patches import hidden_patches, inside, later
from pruned import TOLERANCE
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.errors import NotFiredError, UnsupportedModelError
from tokenprune.families.tower import Tower, find_tower
from tokenprune.parts.rectifiers.mass import LogMassRectifier
from tokenprune.parts.recyclers.cluster import ClusterRecycler
from tokenprune.parts.scorers.baseline import RandomScorer

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


@torch.no_grad()
def test_pictures_of_several_sizes_in_padded_rows() -> None:
    """Siglip 2: shorter pictures are filled up by dropped rows, which nobody sees and which keep their state."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = tf.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4, vision_use_head=False)
    models = []
    for attention in ("sdpa", "eager"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models.append(tf.Siglip2VisionModel._from_config(config, attn_implementation=attention).eval())
    model, eager = models
    shapes, random = torch.tensor([[4, 6], [3, 4]]), torch.Generator().manual_seed(0)
    shown = torch.arange(30) < shapes.prod(1, keepdim=True)
    batch = {"pixel_values": torch.randn(2, 30, 48, generator=random), "spatial_shapes": shapes}
    batch["pixel_attention_mask"] = shown.long()
    tower, states = find_tower(model), {}
    handles = [
        tower.blocks[0].register_forward_hook(lambda m, args, output: states.update(before=output)),
        tower.blocks[2].register_forward_hook(lambda m, args, output: states.update(last=output)),
    ]
    with tp.attach_vision(model, tp.Pipeline([inside(1, 0.5)])) as attached:
        reduced = model(**batch).last_hidden_state
        assert attached.stages[0].sizes == (12, 6)
        reduction: Any = attached._run.reduction  # type: ignore[union-attr]
    for handle in handles:
        handle.remove()
    gone = reduction.gone[0][:, 0]
    there = gone.view(2, 30) == 0
    assert there.sum(1).tolist() == [12, 6] and not (there & ~shown).any()
    with hidden_patches(find_tower(eager), {1: gone}):
        expected = eager(**batch).last_hidden_state
    assert (reduced - expected)[there].abs().max() < TOLERANCE
    assert torch.equal(states["last"][~there], states["before"][~there])


@torch.no_grad()
def test_a_wide_picture_has_a_wide_grid() -> None:
    """Not a square one, nor a row: what is left of 24 patches lies in 4 rows of 6."""
    with tp.attach_vision(plain("vit"), tp.Pipeline([inside(1, 0.5)])) as attached:
        attached.tower.module.config.patch_size = 4
        wide = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        attached._model(wide, interpolate_pos_encoding=True)
        assert attached._run.reduction.tokens.grids == (((1, 4, 6),),)  # type: ignore[union-attr]


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
    with pytest.raises(UnsupportedModelError, match="there is no language model"):
        tp.attach_vision(plain("clip"), tp.Pipeline([later(1, 0.5)]))
    attached = tp.attach_vision(plain("clip"), tp.Pipeline([inside(1)]))
    with pytest.raises(NotFiredError, match="no picture has come through"):
        _ = attached.stages
