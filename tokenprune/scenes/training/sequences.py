"""Training sequences: many questions packed behind one image, each as if it were alone.

    prefix (BOS, vision tokens)   question 0   question 1   ...   padding

A question attends to the prefix and to itself, and its positions continue from the prefix, so its logits equal those of
the same question asked alone; the prefix is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IGNORE = -100


@dataclass(frozen=True)
class PackedText:
    """Question and answer tokens of a batch, `S` of them after the prefix.

    `ids [B, S]`, `segment [B, S]` (question number from 1, 0 where padded), `offset [B, S]` place within the question,
    `labels [B, S]` the next answer token or -100, `weight [B, S]` its share in the loss.
    """

    ids: Tensor
    segment: Tensor
    offset: Tensor
    labels: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> PackedText:
        fields = (self.ids, self.segment, self.offset, self.labels, self.weight)
        return PackedText(*(field.to(device) for field in fields))


@dataclass(frozen=True)
class Segment:
    """Tokens that see the prefix and each other: ids, the token each should predict (or -100), its loss weight."""

    ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float]


def question_segment(prompt: Sequence[int], answer: Sequence[int], minor: frozenset[int] = frozenset()) -> Segment:
    """A question with its answer; answer tokens in `minor` count a tenth in the loss."""
    # The last answer token predicts nothing, so it need not be run.
    labels = [IGNORE] * (len(prompt) - 1) + list(answer)
    weights = [0.0] * (len(prompt) - 1) + [0.1 if token in minor else 1.0 for token in answer]
    return Segment([*prompt, *answer][:-1], labels, weights)


def pack_segments(batch: Sequence[Sequence[Segment]], *, pad: int) -> PackedText:
    """Pack the segments of each image one after another; images are padded to the longest."""
    width = max(sum(len(segment.ids) for segment in row) for row in batch)

    def stack(rows: Iterable[list[int]] | Iterable[list[float]], fill: float) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    return PackedText(
        ids=stack(([i for s in row for i in s.ids] for row in batch), pad),
        segment=stack(([n for n, s in enumerate(row, start=1) for _ in s.ids] for row in batch), 0),
        offset=stack(([i for s in row for i in range(len(s.ids))] for row in batch), 0),
        labels=stack(([i for s in row for i in s.labels] for row in batch), IGNORE),
        weight=stack(([w for s in row for w in s.weights] for row in batch), 0.0),
    )


def packed_mask(segment: Tensor, prefix: int) -> Tensor:
    """Who may attend to whom: `[B, 1, prefix + S, prefix + S]` bool.

    Padding (segment 0) sees the prefix like any text, so that no row of the softmax is empty; nothing reads it.
    """
    full = torch.nn.functional.pad(segment, (prefix, 0), value=-1)
    rows, columns = rearrange(full, "b row -> b 1 row 1"), rearrange(full, "b column -> b 1 1 column")
    allowed = (columns == -1) | (rows == columns)
    return allowed & torch.ones_like(allowed[:1]).tril()


def packed_logits(
    model: LlavaForConditionalGeneration, prefix: Tensor, prefix_positions: Tensor, text: PackedText, start: int
) -> Tensor:
    """Logits `[B, S, vocabulary]` of the packed text behind `prefix [B, P, width]`.

    `prefix_positions [B, P]` are the prefix's position ids; every question starts at position `start`.
    """
    language_model = model.model.language_model
    hidden = torch.cat([prefix, language_model.embed_tokens(text.ids)], dim=1)
    positions = torch.cat([prefix_positions, start + text.offset], dim=1)
    mask = packed_mask(text.segment, prefix.shape[1])
    output = language_model(inputs_embeds=hidden, position_ids=positions, attention_mask=mask, use_cache=False)
    return model.lm_head(output.last_hidden_state[:, prefix.shape[1] :])


def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """ViT output with the class token first `[B, 1 + N, vision width]`, and projected vision tokens `[B, N, width]`."""
    features = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    return features, model.model.multi_modal_projector(features[:, 1:])


def image_prefix(model: LlavaForConditionalGeneration, vision: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """BOS and vision tokens `[B, 1 + N, width]` with their positions `[B, 1 + N]`."""
    batch, count, _ = vision.shape
    first = model.model.language_model.embed_tokens(torch.full((batch, 1), bos, device=vision.device))
    positions = repeat(torch.arange(count + 1, device=vision.device), "n -> b n", b=batch)
    return torch.cat([first, vision], dim=1), positions
