"""Where nothing would be dropped, nothing that the untouched model takes is refused, and all is bit-identical."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, FAMILIES, Row, build, inputs
from kinds import ATTENTION, KINDS, fixed, recipe, stage
from torch import Tensor

import tokenprune as tp

GROUPED = recipe(
    "grouped",
    stage(
        1,
        fixed(1.0),
        raters="all_text",
        scorer=ATTENTION,
        grouper="window",
        sampler="uniform",
        rectifier="log_mass",
        positions="renumber",
    ),
)
HARMLESS = {
    "none": recipe("none"),
    "grouped": GROUPED,
    "adaptive": {**recipe("adaptive", *KINDS["adaptive"]["stages"][:1]), "budget": {"keep": 1.0}},
}


def calls(family: str, model: Any) -> dict[str, dict[str, Any]]:
    """Unusual calls, most of which the untouched model takes."""
    batch = dict(inputs(family, model))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = ids.shape[1]
    embeddings = model.get_input_embeddings()(ids)
    keep = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) > 0.2
    head, tail, empty = mask.clone(), mask.clone(), mask.clone()
    head[:, : length // 2] = tail[:, -12:] = empty[1] = 0
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    bare = dict(inputs(family, model, rows=[Row(before=0, after=0)]))
    return {
        "no text behind": dict(inputs(family, model, rows=[Row(before=6, after=0)])),
        "no text at all": bare,
        "no mask": {name: value for name, value in bare.items() if name != "attention_mask"},
        "random mask": {**batch, "attention_mask": mask * keep},
        "first half hidden": {**batch, "attention_mask": head},
        "question hidden": {**batch, "attention_mask": tail},
        "sample hidden": {**batch, "attention_mask": empty},
        "mask of numbers": {**batch, "attention_mask": mask.float()},
        "whole mask": {**batch, "attention_mask": causal},
        "no pixels": {"input_ids": ids},
        "embeddings": {"inputs_embeds": embeddings, "attention_mask": mask},
        "no token types": {name: value for name, value in batch.items() if name != "mm_token_type_ids"},
        "words' positions": {**batch, "position_ids": torch.arange(length)[None].expand(2, -1)},
        "labels": {**batch, "labels": ids},
        "last logits": {**batch, "logits_to_keep": 30},
        "chosen logits": {**batch, "logits_to_keep": torch.arange(0, length, 3)},
        "no cache": {**batch, "use_cache": False},
        "a cache": {**batch, CACHE: None},
        "a tuple": {**batch, "return_dict": False},
        "hidden states": {**batch, "output_hidden_states": True},
    }


def answer(model: Any, call: dict[str, Any]) -> Tensor:
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # else a call leaves them to the next
    if CACHE in call:
        call = {**call, CACHE: tf.DynamicCache(config=model.config.get_text_config())}
    with torch.no_grad():
        output = model(**call)
    if isinstance(output, tuple):
        return output[0]
    return output.logits if output.loss is None else torch.cat([output.logits.flatten(), output.loss[None]])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_refused_and_nothing_changes(family: str) -> None:
    model = build(family, layers=3)
    plain: dict[str, Tensor] = {}
    for name, call in calls(family, model).items():
        try:
            plain[name] = answer(model, call)
        except (ValueError, RuntimeError, IndexError):
            assert family.startswith("qwen"), name  # LLaVA takes all of them
    assert len(plain) >= 14
    for recipe_name, harmless in HARMLESS.items():
        with tp.attach(model, harmless):
            for name, expected in plain.items():
                got = answer(model, calls(family, model)[name])
                assert torch.equal(got.nan_to_num(), expected.nan_to_num()), (recipe_name, name)
