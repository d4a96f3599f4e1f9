"""A batch of questions, one picture each, answered under one condition: by `model.generate`, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from tokenprune.engine.attach import attach
from tokenprune.engine.packed.generate import generate_packed
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.evaluate.cases import Case
from tokenprune.study.evaluate.conditions import Condition, shrink
from tokenprune.study.evaluate.cost import Meter
from tokenprune.study.evaluate.journal import Batch
from tokenprune.study.evaluate.packing import Packer

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.families.load import Chat


def ask(
    chat: Chat,
    cases: Sequence[Case],
    condition: Condition,
    *,
    meter: Meter,
    totals: Sequence[int] | None,
    shares: Sequence[float] | None = None,
    max_new_tokens: int,
    packer: Packer | None = None,
) -> Batch:
    """Greedy answers to `cases` in one batch, and what they cost.

    Where no recipe is compared, `none` is attached: it changes nothing, but its report tells the tokens and grids.

    Args:
        chat: model and processor.
        cases: the batch.
        condition: what to do to the model or to the pictures.
        meter: of the model.
        totals: vision tokens of the untouched pictures, where they are known.
        shares: of its pixels that each picture keeps, for smaller images.
        max_new_tokens: longest answer, in tokens.
        packer: runs what the questions about a picture share once; None asks by `model.generate`.
    """
    pictures, left = None, [1.0] * len(cases)
    if shares is not None:
        made = [shrink(case.picture(), share) for case, share in zip(cases, shares, strict=True)]
        pictures, left = [picture for picture, _ in made], [share for _, share in made]
    recipe = _nothing() if condition.recipe is None else condition.recipe
    with attach(chat.model, recipe) as attached:
        if packer is not None:
            prompt = packer.prompt(cases, pictures)
            asked, real = prompt.input_ids, prompt.attention_mask
            ids = generate_packed(attached, prompt, max_new_tokens=max_new_tokens)
        else:
            pictures = [case.picture() for case in cases] if pictures is None else pictures
            inputs = _inputs(chat, pictures, [case.question for case in cases])
            asked, real = inputs["input_ids"], inputs["attention_mask"]
            ids = _generate(chat, inputs, max_new_tokens)[:, asked.shape[1] :]
    answers = [chat.text(row) for row in ids]
    report = attached.report
    flops = meter.prefills(recipe, report, *meter.words(asked, real))
    if condition.recipe is not None:
        counts = report.vision_tokens
        average, final = counts.double().mean(1).tolist(), counts[:, -1].double().tolist()
        return Batch(answers, list(report.total), average, final, flops, report.seconds)
    seen = report.total
    if totals is None:
        totals = seen
    # A tower with a fixed grid blows the small picture up again: its tokens then count as those that it is worth, while
    # its multiply-adds stay those that it costs.
    tokens = [n * share if got == n else float(got) for got, n, share in zip(seen, totals, left, strict=True)]
    return Batch(answers, list(totals), tokens, list(tokens), flops, 0.0)


@cache
def _nothing() -> Recipe:
    return load_recipe("none")


def _inputs(chat: Chat, pictures: Sequence[Image], questions: Sequence[str]) -> dict[str, Any]:
    """Model inputs, padded on the left, on the model's device and in its dtype."""
    texts = [chat.prompt(question, 1) for question in questions]
    start = getattr(chat.tokenizer, "bos_token", None)
    extra = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}  # never two of them
    made = chat.processor(
        images=[[picture] for picture in pictures],
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **extra,
    )
    device, dtype = chat.model.device, chat.model.dtype
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in made.items()
        if isinstance(value, torch.Tensor)
    }


def _generate(chat: Chat, inputs: dict[str, Any], max_new_tokens: int) -> torch.Tensor:
    settings = chat.model.generation_config
    pad = settings.pad_token_id
    if pad is None:
        end = settings.eos_token_id
        pad = end[0] if isinstance(end, list) else end
    with torch.inference_mode():
        ids: torch.Tensor = chat.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad
        )
    return ids


def model_key(chat: Chat) -> str:
    """Twelve hexadecimal digits for the model: configuration, dtype, device type, and a sample of every weight."""
    made = sha256(chat.model.config.to_json_string().encode())
    made.update(f"{chat.model.dtype} {chat.model.device.type} {chat.model.config._attn_implementation}".encode())
    for name, weight in chat.model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        made.update(name.encode() + str(tuple(weight.shape)).encode() + sample.tobytes())
    return made.hexdigest()[:12]
