"""Attention kernels beyond SDPA and eager: the same choices, and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, build, inputs, next_turn
from kinds import KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, worst
from reference import generate_logits
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

import tokenprune as tp

FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


def built(family: str, attention: Any) -> Any:
    try:
        return build(family, attention=attention)
    except ValueError as error:
        pytest.skip(str(error).split(". ")[0])


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """transformers compiles flex attention and its masks, which takes minutes on a CPU; run them as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.in_turn(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_equals_sdpa(family: str, kind: str, uncompiled: None) -> None:
    """A ragged batch, greedy, and a second turn of text on the same cache."""
    answers = []
    for attention in ("sdpa", "flex_attention"):
        model = built(family, attention)
        batch = inputs(family, model)
        with tp.attach(model, KINDS[kind]) as attached:
            first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            kept = [stage.kept for stage in attached.report.stages]
            following = next_turn(batch, first.sequences)
            turn = generate_logits(model, {**following, CACHE: first[CACHE]})
            answers.append((kept, generate_logits(model, batch), turn))
    (kept, *expected), (flex_kept, *got) = answers
    assert all(torch.equal(a, b) for a, b in zip(kept, flex_kept, strict=True))
    for (sequences, logits), (want, expected_logits) in zip(got, expected, strict=True):
        assert torch.equal(sequences, want)
        assert worst(logits, expected_logits) < TOLERANCE


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_equals_sdpa_in_half_precision(family: str, kernel: str) -> None:
    if not (torch.cuda.is_available() and FLASH[kernel]()):
        pytest.skip(f"{kernel} is not installed, or there is no CUDA device")
    asked = recipe("even", stage(2, fixed(0.5), sampler="uniform"), stage(5, fixed(0.2), sampler="uniform"))
    logits = []
    for attention in ("sdpa", kernel):
        model = built(family, attention).to("cuda", torch.bfloat16)
        batch = {name: tensor.to("cuda") for name, tensor in inputs(family, model).items()}
        with tp.attach(model, asked):
            logits.append(logits_of(model, batch)[:, -1].float())
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()
