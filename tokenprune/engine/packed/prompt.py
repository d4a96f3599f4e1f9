"""Prompts that share pictures: each picture once, and the questions about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import anatomy


@dataclass(frozen=True, eq=False)
class PackedPrompt:
    """Q questions about G pictures. A prompt is a prefix, which ends with the vision tokens, and a question."""

    prefix_ids: Tensor
    """``[G, P]`` int64."""
    prefix: Tensor
    """``[G, P, D]`` embeddings of the prefix, vision features merged in."""
    owner: Tensor
    """``[Q]`` int64, the picture of each question."""
    text_ids: Tensor
    """``[Q, T]`` int64, padded on the right."""
    lengths: Tensor
    """``[Q]`` int64, tokens of each question, at least 1."""
    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    """What the processor made of the G pictures, for recipes that read the vision tower as it runs."""

    @property
    def input_ids(self) -> Tensor:
        """``[Q, P + T]`` int64, padded on the right."""
        return torch.cat([self.prefix_ids[self.owner], self.text_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """``[Q, P + T]`` int64, 0 on padding."""
        place = torch.arange(self.input_ids.shape[1], device=self.owner.device)
        return (place < self.prefix_ids.shape[1] + self.lengths[:, None]).long()


def pack(
    model: Any, pixels: dict[str, Tensor], prefix_ids: Tensor, questions: Sequence[Sequence[int]], owner: Sequence[int]
) -> PackedPrompt:
    """Run the vision tower and put the parts of the prompts together.

    Args:
        model: as for `check_packable`.
        pixels: what the processor made of the G pictures.
        prefix_ids: ``[G, P]`` int64, ends with the placeholders of the one image.
        questions: token ids of each question, at least one.
        owner: the picture of each question.

    Raises:
        UnsupportedModelError: the vision tower gives another number of vision tokens than there are placeholders.
    """
    parts, device = anatomy(model), prefix_ids.device
    embed = parts.base.get_input_embeddings()
    with torch.inference_mode():
        prefix = embed(prefix_ids)
        features = torch.cat(list(parts.base.get_image_features(**pixels).pooler_output)).to(prefix)
        places = parts.vision_mask(prefix_ids, prefix)
        if int(places.sum()) != features.shape[0]:
            raise UnsupportedModelError(
                f"packed: {features.shape[0]} vision tokens for {int(places.sum())} placeholders in the prompt"
            )
        prefix = prefix.masked_scatter(places[..., None], features)
    lengths = torch.tensor([len(question) for question in questions], device=device)
    rows = [torch.tensor(question, device=device) for question in questions]
    text_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return PackedPrompt(prefix_ids, prefix, torch.tensor(owner, device=device), text_ids, lengths, pixels)
