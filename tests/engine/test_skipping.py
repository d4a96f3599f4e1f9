"""`dropped: skip_ffn`: dropped tokens stay for vision tokens to see, and pass by the feed-forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from families import CACHE, Row, build, inputs, next_turn, row_inputs, vision_mask
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, run_both, snapshot, stage_results, worst
from reference import generate_logits, masked_reference, reference_logits

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.recipe import load_recipe
from tokenprune.stage import Stage


def skipping(place: Any, count: Any = 6, **parts: Any) -> dict[str, Any]:
    """A recipe of one stage whose dropped tokens skip."""
    made = fixed(count) if isinstance(count, int | float) else count
    return recipe("skip", stage(place, made, **{"scorer": "random", "dropped": "skip_ffn", **parts}))


def last_skips(name: str, **more: Any) -> dict[str, Any]:
    """A recipe of `KINDS` whose last stage lets its tokens skip."""
    made = copy.deepcopy(KINDS[name])
    made["stages"][-1] |= {"dropped": "skip_ffn", "positions": "original", **more}
    return made


ONE = skipping(3)
RECIPES = {
    "one": ONE,
    "first": skipping("after_vision"),
    "merging": skipping(2, 0.3, scorer="norm", recycler={"type": "cluster", "share": 0.2, "per_cluster": 2}),
    "attention": last_skips("attention"),
    "adaptive": skipping(3, {"type": "threshold", "above": 0.5}),
    "everywhere": skipping(3, kv="all_layers"),
    "behind": recipe(
        "behind",
        stage("after_vision", fixed(0.7), scorer="random", recycler={"type": "cluster", "share": 0.2}),
        stage(4, fixed(0.3), scorer="norm", dropped="skip_ffn"),
    ),
    "behind everywhere": recipe(
        "behind",
        stage(2, fixed(0.7), scorer="random"),
        stage(4, fixed(0.3), scorer="norm", dropped="skip_ffn", kv="all_layers"),
    ),
    "same layer": recipe(
        "same",
        stage(2, {"type": "threshold", "above": 0.3}, scorer="random", rectifier="log_mass", recycler="cluster"),
        stage(2, fixed(4), scorer="norm", dropped="skip_ffn"),
    ),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llava", kind) for kind in RECIPES),
        ("llava_next", "merging"),
        ("qwen2_5_vl", "merging"),
        ("qwen2_5_vl", "behind"),
        ("qwen3_vl", "first"),  # DeepStack
        ("qwen3_vl_moe", "one"),  # experts
        ("gemma3", "merging"),  # windows, pictures in both directions, norms behind the feed-forward
        ("gemma3", "everywhere"),
        ("cohere2_vision", "one"),  # attention and feed-forward side by side
        ("glm4v", "one"),
    ],
)
def test_decoding_equals_the_masked_reference(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    difference, (got, expected), report = run_both(model, batch, RECIPES[kind])
    assert difference < TOLERANCE
    assert torch.equal(got, expected)
    assert report.stages[-1].skips
