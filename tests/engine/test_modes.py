"""Ways to go on from a prompt, for every family: a second picture on the cache, an assistant; and Flash's masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from abilities import refused
from families import CACHE, FAMILIES, Row, build, inputs, next_turn, row_inputs, sizes, vision_mask
from family_models import MODELS
from kinds import KINDS, fixed, recipe, stage
from matrix import model_of
from pruned import TOLERANCE, worst
from reference import generate_logits, masked_reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError

DROPS = recipe("drops", stage(2, fixed(0.6), scorer="random"), stage(5, fixed(0.3), scorer="norm"))


# ------------------------------------------------------------------------------------------------- a second picture


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def padded_row(family: str, model: Any, row: Row, **more: Any) -> dict[str, Tensor]:
    """One prompt behind two tokens of padding, so that there is a mask which must be right."""
    batch = inputs(family, model, rows=[row, replace(row, before=row.before + 2)], **more)
    return {**row_inputs(batch, 0), **{name: batch[name][:1] for name in PER_TOKEN if name in batch}}


def in_turns(family: str, model: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """Calls of the model for a picture, for two words, and for another picture; and the ids ``[1, L]`` of all."""
    first, last = sizes(family)[0], sizes(family)[-1]
    one = padded_row(family, model, Row(before=4, images=(first,), after=4))
    two = dict(inputs(family, model, rows=[Row(before=5, images=(last,), after=5)], seed=1))
    whole = {name: torch.cat([one[name], two[name]], 1) for name in PER_TOKEN if name in one}
    ends = [one["input_ids"].shape[1], one["input_ids"].shape[1] + 2, whole["input_ids"].shape[1]]
    pixels = [{name: value for name, value in turn.items() if name not in PER_TOKEN} for turn in (one, {}, two)]
    if "image_grid_thw" in one:  # M-RoPE ids of a later picture are told by the whole prompt alone
        seen: list[Any] = []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
        )
        with torch.no_grad():
            model(**whole, **{name: torch.cat([pixels[0][name], pixels[2][name]]) for name in pixels[0]})
        hook.remove()
        if seen[0] is not None and seen[0].dim() == 3:
            whole["position_ids"] = seen[0]
    calls = []
    for start, end, own in zip([0, *ends], ends, pixels, strict=False):
        tokens = {name: value[..., start:end] for name, value in whole.items()}
        calls.append({**tokens, "attention_mask": whole["attention_mask"][:, :end], **own})
    return calls, whole["input_ids"]


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("family", MODELS)
def test_a_second_picture_on_the_cache(family: str) -> None:
    """The second prefill prunes its own picture, and sees of the first what is left of it."""
    model = model_of(family, "sdpa")
    (first, words, second), ids = in_turns(family, model)

    def ran(keep: list[Any] | None = None) -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**first, **{CACHE: cache})
            if keep is not None:
                keep += [told.kept for told in attached.report.stages]
            model(**words, **{CACHE: cache})
            return model(**second, **{CACHE: cache}).logits[:, -1]

    untouched, kept = ran(), list[Any]()
    with tp.attach(model, DROPS) as attached:
        logits = ran(kept)
        total = int(vision_mask(model, first["input_ids"]).sum())
        assert attached.report.prefills == 2 and attached.report.total == (int(vision_mask(model, ids).sum()) - total,)
        both = [torch.cat([a, b.kept + total], 1) for a, b in zip(kept, attached.report.stages, strict=True)]
    with masked_reference(model, vision_mask(model, ids), list(zip([2, 5], both, strict=True))):
        expected = ran()
    assert (logits - expected).abs().max() < TOLERANCE < (logits - untouched).abs().max() / 10


# ------------------------------------------------------------------------------------------------- an assistant


SOME = {"qwen2_vl", "qwen3_5", "gemma3", "idefics3", "kimi_k25", "lfm2_vl", "llava", "llava_next"}
"""Plain, M-RoPE, windows, tiles, latent attention, recurrent layers: the others with ``-m slow``."""


@pytest.mark.parametrize(
    "family", [family if family in SOME else pytest.param(family, marks=pytest.mark.slow) for family in MODELS]
)
def test_assisted_decoding_gives_the_greedy_answer(family: str) -> None:
    """The assistant, another model, guesses; the pruned model reads its guesses and cuts its caches back."""
    model, assistant = model_of(family, "sdpa"), build(family, seed=1, layers=3)
    batch = padded_row(family, model, Row(after=12))
    options = {"max_new_tokens": 8, "do_sample": False}
    if "prompt lookup" in refused(family):
        with tp.attach(model, KINDS["merging"]), pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(**batch, **options, assistant_model=assistant)
        return
    with tp.attach(model, KINDS["merging"]):
        greedy = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options, assistant_model=assistant), greedy)
        with tp.attach(assistant, "last", keep=0.5):
            assert torch.equal(model.generate(**batch, **options, assistant_model=assistant), greedy)


@pytest.mark.parametrize("family", [family for family in MODELS if "static" in refused(family)])
def test_static_caches_of_windows_are_refused_by_name(family: str) -> None:
    model = model_of(family, "sdpa")
    with tp.attach(model, DROPS), pytest.raises(UnsupportedModelError, match=re.escape(refused(family)["static"])):
        model.generate(**inputs(family, model), max_new_tokens=2, cache_implementation="static")


# ------------------------------------------------------------------------------------------------- Flash's masks

NAME = "flash_like_on_cpu"


def flash_like(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a Flash kernel gives for what it is given: causal by itself, aligned at the end, padding hidden by a mask of
    two dimensions; and several sequences in one row where position ids start anew, which must not happen here."""
    assert attention_mask is None or attention_mask.dim() == 2
    assert not _is_packed_sequence(position_ids, query.shape[0])
    queries, keys = query.shape[2], key.shape[2]
    shown = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape[1] == keys
        shown = shown & attention_mask[:, None, None].bool()
    shown = shown | ~shown.any(-1, keepdim=True)  # rows of padding, which nobody reads
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, shown, scale=scaling).transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[None]:
    """The kernel under a name that says flash, and with Flash's own masks."""
    AttentionInterface.register(NAME, flash_like)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    AttentionInterface._global_mapping.pop(NAME)
    AttentionMaskInterface._global_mapping.pop(NAME)


@pytest.mark.in_turn(6)
@pytest.mark.parametrize("shape", ["alone", "ragged", "even"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_masks_on_cpu_equal_sdpa(shape: str, kind: str, family: str, flash: None) -> None:
    """A row alone and prompts of one length, without a mask; a ragged batch, with one; greedy, and a second turn of
    text on the same cache."""
    rows = {"alone": [Row()], "ragged": None, "even": [Row(), Row()]}[shape]
    answers = []
    for attention in ("sdpa", NAME):
        model: Any = build(family)
        batch = inputs(family, model, rows=rows)
        model.get_decoder().config._attn_implementation = attention
        with tp.attach(model, KINDS[kind]) as attached:
            first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            kept = [told.kept for told in attached.report.stages]
            turn = generate_logits(model, {**next_turn(batch, first.sequences), CACHE: first[CACHE]}, max_new_tokens=2)
            answers.append((kept, generate_logits(model, batch, max_new_tokens=3), turn))
    (kept, *expected), (flash_kept, *got) = answers
    assert all(map(torch.equal, kept, flash_kept))
    for (sequences, logits), (want, expected_logits) in zip(got, expected, strict=True):
        assert torch.equal(sequences, want)
        assert worst(logits, expected_logits) < TOLERANCE
