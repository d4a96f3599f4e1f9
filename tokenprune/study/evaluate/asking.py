"""A batch of questions, one picture each, answered under one condition, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

from tokenprune.engine.attach import attach
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.cases import Case
from tokenprune.study.evaluate.askers import Asker
from tokenprune.study.evaluate.conditions import Condition, shrink
from tokenprune.study.evaluate.cost import Meter
from tokenprune.study.evaluate.journal import Batch

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat


def ask(
    asker: Asker,
    cases: Sequence[Case],
    condition: Condition,
    *,
    meter: Meter,
    totals: Sequence[int] | None,
    shares: Sequence[float] | None = None,
    max_new_tokens: int,
) -> Batch:
    """Greedy answers to `cases` in one batch, and what they cost.

    Where no recipe is compared, `none` is attached: it changes nothing, but its report tells the tokens and grids.

    Args:
        asker: how; it holds model and processor.
        cases: the batch.
        condition: what to do to the model or to the pictures.
        meter: of the model.
        totals: vision tokens of the untouched pictures, where they are known.
        shares: of its pixels that each picture keeps, for smaller images.
        max_new_tokens: longest answer, in tokens.
    """
    pictures, left = None, [1.0] * len(cases)
    if shares is not None:
        made = [shrink(case.picture(), share) for case, share in zip(cases, shares, strict=True)]
        pictures, left = [picture for picture, _ in made], [share for _, share in made]
    recipe = _nothing() if condition.recipe is None else condition.recipe
    with attach(asker.chat.model, recipe) as attached:
        asked = asker.ask(attached, cases, pictures, max_new_tokens)
    answers = [asker.chat.text(row) for row in asked.answers]
    report = attached.report
    flops = meter.prefills(recipe, report, asked.input_ids, asked.attention_mask)
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


def model_key(chat: Chat) -> str:
    """Twelve hexadecimal digits for the model: configuration, dtype, device type, and a sample of every weight."""
    made = sha256(chat.model.config.to_json_string().encode())
    made.update(f"{chat.model.dtype} {chat.model.device.type} {chat.model.config._attn_implementation}".encode())
    for name, weight in chat.model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        made.update(name.encode() + str(tuple(weight.shape)).encode() + sample.tobytes())
    return made.hexdigest()[:12]
