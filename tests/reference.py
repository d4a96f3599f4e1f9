"""What the tests need around the masked reference (`tokenprune.testing.reference`): its logits, and comparing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenprune.testing.reference import Hidden as Stage
from tokenprune.testing.reference import masked_reference as masked_reference
from tokenprune.testing.reference import visible_columns
from tokenprune.testing.reference import vision_mask as vision_mask
from tokenprune.testing.runs import generate_logits as generate_logits


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], stages: Sequence[Stage | tuple[Any, ...]]
) -> Tensor:
    """Logits [B, L, V] of one masked forward over the whole prompt; those at dropped tokens mean nothing."""
    with masked_reference(model, vision_mask(model, inputs["input_ids"]), stages):
        return model(**inputs).logits


def surviving(
    vision: Tensor, attention_mask: Tensor, kept: Tensor, anchors: Tensor | None = None, *, padding: bool = False
) -> list[Tensor]:
    """For each row, the ascending columns of its text tokens and of the vision tokens in `kept` (of the last stage).

    With `padding` also the padding columns of the prompt, which a pruned sequence may well carry along.
    """
    columns = [row.nonzero().flatten() for row in vision]
    visible = visible_columns(vision, columns, Stage(0, kept, anchors))
    text = ~vision if padding else ~vision & attention_mask.bool()
    return [row.nonzero().flatten() for row in text | visible]


def pruned_difference(
    pruned: Tensor,
    reference: Tensor,
    vision: Tensor,
    attention_mask: Tensor,
    kept: Tensor,
    anchors: Tensor | None = None,
) -> float:
    """Largest difference of logits [B, shorter, V] that a pruned model gave from the reference's [B, L, V].

    The pruned sequence holds each row's survivors and its prompt padding in order, flush right: rows that kept fewer
    tokens than the longest are padded on the left. Padding is not compared.
    """
    worst = 0.0
    for row, columns in enumerate(surviving(vision, attention_mask, kept, anchors, padding=True)):
        real = attention_mask[row, columns].bool()
        difference = pruned[row, -len(columns) :][real] - reference[row, columns][real]
        worst = max(worst, difference.abs().max().item())
    return worst


def random_kept(vision: Tensor, keep: float, *, seed: int = 0, within: Tensor | None = None) -> Tensor:
    """int64 [B, K]: a random share of each sample's vision tokens (or of those in `within`), ascending, at least one.

    An int `keep` is a count; -1 pads samples that have fewer.
    """
    random = torch.Generator().manual_seed(seed)
    rows = []
    for sample, mask in enumerate(vision):
        own = torch.arange(int(mask.sum())) if within is None else within[sample][within[sample] >= 0].cpu()
        count = keep if isinstance(keep, int) else max(1, round(keep * len(own)))
        rows.append(own[torch.randperm(len(own), generator=random)[:count]].sort().values)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(vision.device)
