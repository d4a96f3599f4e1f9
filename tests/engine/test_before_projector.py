"""Merging in front of the projector: a model's own tower and projector, with plain Python's merge between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain_tower as plain
import pytest
import torch
from families import Row, build, inputs
from pruned import TOLERANCE, logits_of, stage_results
from torch import Tensor

import tokenprune as tp
from tokenprune.core.needs import Needs
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.recyclers.absorb import AbsorbRecycler
from tokenprune.parts.recyclers.bipartite import BipartiteRecycler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.stage import Stage


def of_the_tower(model: Any, batch: Any, counts: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What LLaVA's projector reads of each sample, keys of the same block ``[n, H, d]``, and keys of the last block."""
    tower, found = model.model.vision_tower, {}
    blocks = tower.encoder.layers
    handles = [
        blocks[at].self_attn.k_proj.register_forward_hook(lambda m, args, output, at=at: found.update({at: output}))
        for at in (-2, -1)
    ]
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
    for handle in handles:
        handle.remove()
    heads = blocks[0].self_attn.num_heads
    flat = [x[:, 1:].flatten(0, 1) for x in (states, found[-2], found[-1])]
    read, keys, last = flat[0], *(x.unflatten(-1, (heads, -1)) for x in flat[1:])
    return list(read.split(counts)), list(keys.split(counts)), list(last.split(counts))


@pytest.mark.parametrize("name", ["visionzip", "prumerge"])
@torch.no_grad()
def test_merged_tokens_are_projected_merges(name: str) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, name, keep=0.4) as attached, stage_results(attached) as results:
        logits_of(model, batch)
        report = attached.report
    assert report.notes == ()
    (result,) = results
    read, keys, last = of_the_tower(model, batch, list(report.total))
    for row, total in enumerate(report.total):
        kept = result.kept[row][result.kept[row] >= 0].tolist()
        size = result.tokens.sizes[row]

        def merged(x: Tensor, row: int = row, kept: list[int] = kept, total: int = total) -> dict[int, np.ndarray]:
            rows = x.double().numpy()
            if name == "visionzip":
                chosen = np.isin(np.arange(total), kept).astype(float)
                targets = int((result.merged[row] >= 0).sum())
                return plain.visionzip(rows, chosen, keys[row].double().numpy(), len(kept), targets)
            assert result.scores is not None
            attention = result.scores[row, :total].double().numpy()
            return plain.prumerge(rows, attention, last[row].double().numpy(), kept, 32)

        states = merged(read[row])
        assert result.tokens.origin[row, :size].tolist() == list(states)
        project = model.model.multi_modal_projector
        expected = project(torch.tensor(np.array(list(states.values()))).float())
        assert (result.tokens.hidden[row, :size] - expected).abs().max() < TOLERANCE * 5
        # and it matters
        behind = torch.tensor(np.array(list(merged(project(read[row])).values()))).float()
        assert (expected - behind).abs().max() > 1e-3


class Projecting(Scorer):
    """Remembers what the projector makes of the tower's states, and what the model has made of them."""

    reads = Needs(tower="hidden", projector=True)

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        assert tokens.projector is not None
        self.made, self.seen = tokens.projector(tokens.signal("hidden")), tokens
        self.read = tokens.signal("hidden")
        return tokens.only_valid(tokens.hidden[..., 0].float())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_the_projector_of_a_family_makes_its_vision_tokens_of_the_signal(family: str) -> None:
    """But separators of tiles, which come from no patch."""
    model, scorer = build(family), Projecting()
    with tp.attach(
        model, tp.Pipeline([Stage(place="after_vision", scheduler=FixedScheduler(keep=0.5), scorer=scorer)])
    ):
        logits_of(model, inputs(family, model))
    patches = scorer.seen.valid & (scorer.read.abs().sum(-1) > 0)
    assert (scorer.made - scorer.seen.hidden)[patches].abs().max() < TOLERANCE
    assert patches.sum() > 0.8 * scorer.seen.valid.sum()


@torch.no_grad()
def test_a_projector_of_several_patches_is_told_and_its_output_merged() -> None:
    model = build("qwen2_5_vl")
    batch = inputs("qwen2_5_vl", model, rows=[Row()])
    with tp.attach(model, "visionzip", keep=0.4) as attached:
        before = logits_of(model, batch)
        notes = attached.report.notes
    assert any("does not take tokens one by one; what it gives is merged" in note for note in notes)
    recipe = tp.load_recipe("visionzip", keep=0.4).to_dict()
    recipe["stages"][0]["recycler"]["before_projector"] = False
    with tp.attach(model, recipe) as attached:
        assert torch.equal(logits_of(model, batch), before)
        assert not any("one by one" in note for note in attached.report.notes)


@pytest.mark.parametrize("recycler", [BipartiteRecycler(before_projector=True), AbsorbRecycler(before_projector=True)])
def test_only_after_vision(recycler: Any) -> None:
    recipe = {
        "version": 1,
        "stages": [
            {
                "place": {"before_layer": 3},
                "scheduler": {"type": "fixed", "keep": 0.5},
                "recycler": {"type": recycler.name(), "before_projector": True},
            }
        ],
    }
    with pytest.raises(RecipeError, match="the projector: before a decoder layer, states are no longer what it gives"):
        tp.load_recipe(recipe)


class Sneaking(Projecting):
    reads = Needs(tower="hidden")


def test_a_part_declares_that_it_reads_the_projector() -> None:
    model = build("llava")
    stage = Stage(place="after_vision", scheduler=FixedScheduler(keep=0.5), scorer=Sneaking())
    other = Stage(place="after_vision", scheduler=FixedScheduler(keep=0.4), scorer=Projecting())
    with (
        tp.attach(model, tp.Pipeline([stage, other])),
        pytest.raises(InputError, match=r"reads the projector, but does not declare it"),
    ):
        logits_of(model, inputs("llava", model))
