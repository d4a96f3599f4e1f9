"""`encode`: embeddings and positions that an untouched model answers as the attached one does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build
from family_models.tiny import IMAGE, VISION_END, VISION_START
from kinds import fixed, recipe, stage
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError, UnsupportedModelError
from tokenprune.families.chat import Chat
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases

STEPS = 3
NORM = recipe("norm", stage("after_vision", fixed(0.4), scorer="norm"))
RECIPES: dict[str, Any] = {
    "original": NORM,
    "renumber": recipe("renumber", stage("after_vision", fixed(0.4), scorer="norm", positions="renumber")),
    "merged": recipe(
        "merged",
        stage("after_vision", fixed(0.3), scorer="norm", recycler={"type": "cluster", "share": 0.5, "per_cluster": 3}),
    ),
    "tower": recipe("tower", stage("after_vision", fixed(0.4), scorer="received_attention")),
    "inside": recipe("inside", {"place": {"in_vision": {"block": 1}}, "scheduler": fixed(0.5), "scorer": "norm"}),
    "tome": "tome",  # inside, with a rectifier that ends with the tower
    "whole": recipe("whole"),
}


class QwenProcessor:
    """The family's own pixels and token counts around a prompt of fixed ids: tiny models have no tokenizer."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=4096
        )

    def __call__(self, images: Any, text: Any, **_: Any) -> dict[str, Tensor]:
        made = dict(self.image_processor(images=[each for own in images for each in own], return_tensors="pt"))
        before, after = [5, 6], [int(word) for word in text[0].split() if word.isdigit()]
        pictures = [[VISION_START, *[IMAGE] * (int(grid.prod()) // 4), VISION_END] for grid in made["image_grid_thw"]]
        ids = torch.tensor([before + [token for picture in pictures for token in picture] + after])
        return {**made, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}


def chat_of(family: str) -> Chat:
    if family == "llava":
        return Chat("embedded", *load_embedded())
    return Chat(family, build(family, layers=3), QwenProcessor())


def pictures_of(family: str) -> list[Any]:
    if family == "llava":
        cases = scene_cases(2)
        return [cases[0].picture(), cases[-1].picture()]
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((32, 48), (56, 24))]


@torch.inference_mode()
def answered(chat: Chat, inputs: dict[str, Tensor], encoded: tp.Encoded) -> tuple[Tensor, Tensor]:
    """Greedy ids, and logits of the first, of the untouched model on embeddings and positions, without a cache."""
    ids = inputs["input_ids"][0]
    at = (ids == chat.model.config.image_token_id).nonzero()[:, 0]
    before, after = ids[: at[0]], ids[at[-1] + 1 :]
    embed = chat.model.get_input_embeddings()
    front = torch.arange(len(before)).expand(*encoded.position.shape[:-1], -1)
    made, first = after, None
    for _ in range(STEPS):
        behind = len(before) + encoded.advance + torch.arange(len(made)).expand(*front.shape[:-1], -1)
        positions = torch.cat([front, len(before) + encoded.position, behind], -1)
        logits = chat.model(
            inputs_embeds=torch.cat([embed(before), encoded.hidden, embed(made)])[None],
            position_ids=positions[None] if positions.dim() == 1 else positions[:, None],
        ).logits[0, -1]
        first = logits if first is None else first
        made = torch.cat([made, logits.argmax()[None]])
    assert first is not None
    return made[len(after) :], first


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_untouched_model_answers_as_the_attached_one(family: str) -> None:
    chat, pictures = chat_of(family), pictures_of(family)
    others = []
    for name, made in RECIPES.items():
        if name == "tome" and family != "llava":  # this tower takes no mask, so no rectifier
            continue
        for picture, encoded in zip(pictures, tp.encode(chat.model, chat.processor, pictures, made), strict=True):
            inputs = chat.inputs([picture], "7 8 9 10" if family != "llava" else "What color is the square?")
            with tp.attach(chat.model, made) as attached, torch.inference_mode():
                out = chat.model.generate(
                    **inputs,
                    max_new_tokens=STEPS,
                    min_new_tokens=STEPS,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                    **({"eos_token_id": None} if family == "llava" else {}),
                )
            left = attached.report.stages[-1].left[0].tolist() if attached.report.stages else None
            assert encoded.kept.tolist() == (left or list(range(len(encoded.kept)))), name
            assert encoded.grids == attached.report.grids[0]
            ids, first = answered(chat, dict(inputs), encoded)
            assert ids.tolist() == out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), name
            torch.testing.assert_close(first, out.logits[0][0], atol=1e-5 * float(first.abs().max()), rtol=1e-5)
            others.append(first)
    assert len({tuple(first.tolist()) for first in others}) == len(others), "the recipes cannot be told apart"


def test_pictures_are_encoded_alone_and_leave_no_trace() -> None:
    chat, pictures = chat_of("qwen2_5_vl"), pictures_of("qwen2_5_vl")
    hooks = [len(module._forward_pre_hooks) for module in chat.model.modules()]
    together = tp.encode(chat.model, chat.processor, pictures, NORM)
    alone = [tp.encode(chat.model, chat.processor, [picture], NORM)[0] for picture in pictures]
    (single,) = tp.encode(chat.model, chat.processor, pictures[0], NORM)
    assert torch.equal(single.hidden, together[0].hidden)
    with pytest.raises(InputError, match=r"pictures: no such file: nofile\.png"):
        tp.encode(chat.model, chat.processor, "nofile.png", NORM)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.hidden, other.hidden) and torch.equal(one.position, other.position)
    assert "forward" not in vars(chat.model.get_decoder().layers[0])
    assert [len(module._forward_pre_hooks) for module in chat.model.modules()] == hooks


@pytest.mark.parametrize(("made", "reason"), [("fastv", "between layers"), ("cdpruner", "rated by text")])
def test_what_embeddings_cannot_carry_is_refused(made: Any, reason: str) -> None:
    chat = chat_of("qwen2_5_vl")
    with pytest.raises(RecipeError, match=f"encode: .*{reason}"):
        tp.encode(chat.model, chat.processor, pictures_of("qwen2_5_vl"), made)


def test_deepstack_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Qwen3-VL adds features .* \(DeepStack\)"):
        tp.encode(build("qwen3_vl", layers=2), QwenProcessor(), pictures_of("qwen3_vl"), NORM)
