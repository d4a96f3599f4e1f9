"""Kept sets equal plain implementations of the papers on eager attention, stage by stage, in the real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from families import Row, build, inputs, sizes, vision_mask
from kinds import ATTENTION, fixed, recipe, stage
from pruned import logits_of
from reference import Stage, masked_reference

import tokenprune as tp

COUNTS = ((2, 14), (4, 8), (6, 4))
SAME_PLACE = ((4, 14), (4, 8), (4, 4))
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Seen:
    """One forward of the unpruned model, earlier stages hidden by the mask: attention, hidden states, q and k."""

    def __init__(self, model: Any, batch: Any, stages: list[Stage]) -> None:
        self.projected: dict[str, list[Any]] = {"q_proj": [], "k_proj": []}
        handles = [
            getattr(layer.self_attn, name).register_forward_hook(
                lambda module, args, output, name=name: self.projected[name].append(output[0].double())
            )
            for layer in model.get_decoder().layers
            for name in self.projected
        ]
        with torch.no_grad(), masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
            output = model(**batch, output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        self.attention = [layer[0].double().numpy() for layer in output.attentions]
        self.hidden = [states[0].double().numpy() for states in output.hidden_states]
        self.width = model.get_decoder().layers[0].self_attn.head_dim

    def before_rope(self, layer: int, name: str) -> Any:
        """``[H, L, d]``."""
        return self.projected[name][layer].unflatten(-1, (-1, self.width)).transpose(0, 1).numpy()


Counts = tuple[tuple[int, int], ...]
Choice = Callable[[Seen, int, int, list[int], list[int]], tuple[list[int], dict[int, Any]]]


def played(model: Any, batch: Any, choose: Choice, counts: Counts) -> list[Stage]:
    """All stages by `choose` (what was seen, layer, count, columns of what is left, text columns), in order."""
    vision = vision_mask(model, batch["input_ids"])[0]
    original = vision.nonzero().flatten().tolist()
    text = [i for i in range(len(vision)) if i > original[0] and not vision[i]]
    left, stages = list(range(len(original))), list[Stage]()
    for layer, count in counts:
        columns = [original[i] for i in left]
        kept, merged = choose(Seen(model, batch, stages), layer, count, columns, text)
        anchors = sorted(merged)
        states = torch.tensor([merged[i].tolist() for i in anchors]) if anchors else torch.zeros(0, 0)
        stages.append(
            Stage(
                layer,
                torch.tensor([[left[i] for i in kept]]),
                torch.tensor([[left[i] for i in anchors]], dtype=torch.long),
                states[None].float() if anchors else None,
            )
        )
        left = sorted(left[i] for i in [*kept, *anchors])
    return stages


def check(family: str, choose: Choice, counts: Counts = COUNTS, **parts: Any) -> None:
    model = build(family, attention="eager")
    batch = inputs(family, model, rows=[Row(images=sizes(family)[:1], after=9)])
    asked = recipe("parity", *(stage(layer, fixed(count), **parts) for layer, count in counts))
    expected = played(model, batch, choose, counts)
    with tp.attach(model, asked) as attached:
        logits_of(model, batch)
    for got, want in zip(attached.report.stages, expected, strict=True):
        assert got.kept.tolist() == want.kept.tolist()
        assert got.merged.tolist() == want.anchors.tolist()


@pytest.mark.parametrize("counts", [COUNTS, SAME_PLACE], ids=["three places", "three stages at one place"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fastv(family: str, counts: Counts) -> None:
    def choose(seen: Seen, layer: int, count: int, columns: list[int], text: list[int]) -> Any:
        return plain.fastv(seen.attention[layer - 1], columns, text[-1], count), {}

    check(family, choose, counts, raters="last_text", scorer=ATTENTION)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_feather_scores(family: str) -> None:
    def choose(seen: Seen, layer: int, count: int, columns: list[int], text: list[int]) -> Any:
        q, k = (seen.before_rope(layer - 1, name) for name in ("q_proj", "k_proj"))
        return plain.best(plain.feather_scores(q, k, columns, text[-1]), count), {}

    check(family, choose, raters="last_text", scorer={"type": "attention", "rope": False, "normalise": "vision"})


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_sparsevlm_raters_scores_and_merging(family: str) -> None:
    def choose(seen: Seen, layer: int, count: int, columns: list[int], text: list[int]) -> Any:
        original = [i for i in range(len(seen.hidden[0])) if i >= columns_of_image[0] and i <= columns_of_image[1]]
        raters = plain.above_mean_raters(seen.hidden[0][original], seen.hidden[0][text])
        scores = plain.attention_scores(seen.attention[layer - 1], [text[i] for i in raters], columns)
        return plain.sparsevlm_stage(seen.hidden[layer][columns], scores, count)

    model = build(family)
    vision = vision_mask(model, inputs(family, model, rows=[Row(images=sizes(family)[:1], after=9)])["input_ids"])[0]
    columns_of_image = (int(vision.nonzero()[0]), int(vision.nonzero()[-1]))
    check(family, choose, raters="above_mean", scorer=ATTENTION, recycler="cluster")


def test_feather_union_on_the_real_grid() -> None:
    """Every third row and column, and the best by score, exactly counted."""
    model = build("llava", attention="eager")
    batch = inputs("llava", model, rows=[Row(after=9)])
    union = recipe(
        "union",
        stage(
            2,
            {"type": "lattice", "stride": 3, "keep": 0.3},
            raters="last_text",
            scorer={"type": "attention", "rope": False, "normalise": "vision"},
            sampler={"type": "union", "stride": 3},
        ),
    )
    seen = Seen(model, batch, [])
    vision = vision_mask(model, batch["input_ids"])[0]
    q, k = (seen.before_rope(1, name) for name in ("q_proj", "k_proj"))
    scores = plain.feather_scores(q, k, vision.nonzero().flatten().tolist(), len(vision) - 1)
    with tp.attach(model, union) as attached:
        logits_of(model, batch)
    assert attached.report.stages[0].kept[0].tolist() == plain.feather(scores, int(0.3 * 25), 5, 5, 3)
