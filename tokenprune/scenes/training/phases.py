"""The four phases of training, after those of real VLMs.

    text          decoder alone: words that repeat recent words
    language      decoder alone: every vision token is a noisy sum of word embeddings, the questions are text
    alignment     ViT and projector alone: vision tokens learn to lie where those sums would
    instruction   everything, end to end, on pictures and questions

The decoder learns to match colour and shape without pictures first; from pictures alone that takes most of the
training, because nothing rewards it before the ViT sees shapes. It always reads all vision tokens: a model that is
trained on some of them would be used to missing ones, and pruning would look better than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.scenes.training.alignment import Teacher
from tokenprune.scenes.training.batches import Batch
from tokenprune.scenes.training.sequences import IGNORE, PackedText, image_prefix, packed_logits, vision_features
from tokenprune.scenes.world.vocabulary import BOS, VISION_TOKENS, token_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Phase:
    """One phase of training: what each of its steps reads, and how fast which part of the model learns.

    Attributes:
        name: its key in plans and logs.
        steps: optimiser steps of the shipped run; runs of other lengths keep the proportions.
        batch: scenes a step; 0 for a phase of texts alone.
        questions: questions about each scene; 0 trains without questions, captions and tallies.
        captions: lists of all objects for each scene.
        tallies: counts of several attributes for each scene.
        rate: the highest learning rate.
        final: share of `rate` at the last step.
        hold: share of the steps before the rate falls.
        decoder: share of the rate at which the decoder learns; 0 freezes it.
        vision: share of the rate at which ViT and projector learn; 0 freezes them, and scenes come without pictures.
        align: weight of the alignment loss.
        texts: texts in every `text_every`-th step.
        text_every: steps from one batch of texts to the next.
        noise: standard deviation of the noise on vision tokens where scenes come without pictures.
    """

    name: str
    steps: int
    batch: int
    questions: int
    captions: int
    tallies: int
    rate: float
    final: float
    hold: float
    decoder: float
    vision: float
    align: float
    texts: int = 0
    text_every: int = 1
    noise: float = 0.35


PHASES = (
    Phase("text", 400, 0, 0, 0, 0, 3e-3, 0.3, 0.6, decoder=1.0, vision=0.0, align=0.0, texts=6),
    Phase("language", 2000, 6, 6, 2, 1, 3e-3, 0.1, 0.6, decoder=1.0, vision=0.0, align=0.0, texts=6, text_every=8),
    Phase("alignment", 1500, 16, 0, 0, 0, 3e-3, 0.1, 0.6, decoder=0.0, vision=1.0, align=1.0),
    Phase("instruction", 1400, 8, 8, 1, 1, 2e-3, 0.01, 0.4, decoder=0.5, vision=1.0, align=0.2, texts=6, text_every=8),
)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at one `share` of the rate: `matrices` of hidden layers by Muon, the `rest` by AdamW."""

    share: float
    matrices: list[nn.Parameter]
    rest: list[nn.Parameter]


def parameter_groups(phase: Phase, model: LlavaForConditionalGeneration, teacher: Teacher) -> list[ParameterGroup]:
    """Parameters that a phase trains, in groups that learn alike.

    Word embeddings stay as initialised: random codes are far apart, and the other phases aim at them.
    """
    decoder, vision = ParameterGroup(phase.decoder, [], []), ParameterGroup(phase.vision, [], [])
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "post_layernorm" in name:
            continue
        group = decoder if "language_model" in name or "lm_head" in name else vision
        hidden = parameter.ndim == 2 and (".layers." in name or "multi_modal_projector" in name)
        (group.matrices if hidden else group.rest).append(parameter)
    vision.rest.extend(teacher.parameters())
    return [group for group in (decoder, vision) if group.share]


def answer_loss(logits: Tensor, text: PackedText) -> Tensor:
    """Weighted cross-entropy of the answer tokens of `logits [B, S, V]`."""
    flat = rearrange(logits, "b s v -> (b s) v").float()
    loss = F.cross_entropy(flat, rearrange(text.labels, "b s -> (b s)"), ignore_index=IGNORE, reduction="none")
    weight = rearrange(text.weight, "b s -> (b s)")
    return (loss * weight).sum() / weight.sum()


def right_answers(logits: Tensor, text: PackedText) -> list[list[bool]]:
    """For each question whether every answer token is the most likely one, which greedy decoding would then emit."""
    wrong = (logits.argmax(-1) != text.labels) & (text.labels != IGNORE) & (text.weight > 0)
    count = int(text.segment.max())
    bad = torch.zeros(len(wrong), count + 1, device=wrong.device).scatter_add_(1, text.segment, wrong.float())
    return (bad[:, 1:] == 0).tolist()


def symbolic_prefix(
    phase: Phase, model: LlavaForConditionalGeneration, teacher: Teacher, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prefix of a scene without its picture: BOS, then the target of each vision token with noise."""
    symbols = teacher.targets(labels, model.model.language_model.embed_tokens.weight)
    symbols = symbols + phase.noise * torch.randn(symbols.shape, generator=generator).to(symbols.device)
    return image_prefix(model, symbols, token_ids()[BOS])


def text_loss(model: LlavaForConditionalGeneration, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next word in texts `ids [B, 1 + L]`, without a picture.

    Their position ids are those behind a picture, which no control renumbers.
    """
    inputs = ids[:, :-1]
    positions = VISION_TOKENS + 1 + torch.arange(inputs.shape[1], device=ids.device)[None]
    output = model.model.language_model(input_ids=inputs, position_ids=positions, use_cache=False)
    logits = rearrange(model.lm_head(output.last_hidden_state), "b n v -> (b n) v")
    return F.cross_entropy(logits.float(), rearrange(ids[:, 1:], "b n -> (b n)"))


def phase_loss(
    phase: Phase, model: LlavaForConditionalGeneration, teacher: Teacher, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float], list[list[bool]]]:
    """Loss of one batch, its parts by name, and which questions were answered right (empty without questions)."""
    device = model.device
    labels = batch.labels.to(device)
    embedding = model.model.language_model.embed_tokens.weight
    total = torch.zeros((), device=device)
    parts: dict[str, float] = {}
    prefix: tuple[Tensor, Tensor] | None = None
    if batch.pixels is not None:
        features, vision = vision_features(model, batch.pixels.to(device))
        dense, summary, align = teacher.losses(features, vision, labels, embedding)
        total = total + phase.align * (0.3 * dense + 0.3 * summary + align)
        parts |= {"dense": float(dense.detach()), "summary": float(summary.detach()), "align": float(align.detach())}
        prefix = image_prefix(model, vision, token_ids()[BOS])
    if batch.text is None:
        return total, parts, []
    text = batch.text.to(device)
    vectors, positions = prefix or symbolic_prefix(phase, model, teacher, labels, generator)
    logits = packed_logits(model, vectors, positions, text, start=VISION_TOKENS + 1)
    answer = answer_loss(logits, text)
    parts["answer"] = float(answer.detach())
    return total + answer, parts, right_answers(logits.detach(), text)
