"""The three stages of training, after those of real VLMs.

    language      decoder alone: a scene is a few symbolic tokens (sums of word embeddings), the questions are text
    alignment     ViT and projector alone: vision tokens learn to lie where the symbolic tokens would
    instruction   everything, end to end, on pictures and questions

The decoder learns to match colour and shape on short cheap sequences first; from pictures alone that takes most of the
training, because nothing rewards it before the ViT sees shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.scenes.alignment import Teacher
from tokenprune.scenes.batches import Batch, symbolic_choice
from tokenprune.scenes.packing import IGNORE, PackedText, image_prefix, packed_logits, vision_features
from tokenprune.scenes.vocabulary import BOS, VISION_TOKENS, token_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `steps` of the shipped run (other lengths keep the proportions), `batch` scenes a step with `questions`, `captions`
    and `tallies` each, peak learning `rate` held for the share `hold` of the steps, then falling to the share `final`
    of it; what is trained, and the weight of `align`.
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
    decoder: bool
    vision: bool
    align: float
    symbols: int = 24
    noise: float = 0.35


STAGES = (
    Stage("language", 2400, 6, 5, 2, 0, 3e-3, 0.1, 0.6, decoder=True, vision=False, align=0.0),
    Stage("alignment", 1400, 16, 0, 0, 0, 3e-3, 0.1, 0.6, decoder=False, vision=True, align=1.0),
    Stage("instruction", 900, 8, 8, 1, 1, 2e-3, 0.01, 0.4, decoder=True, vision=True, align=0.2),
)


def stage_parameters(
    stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that a stage trains: (hidden matrices for Muon, the rest for AdamW).

    Word embeddings stay as initialised: random codes are far apart, and the other stages aim at them.
    """
    chosen: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        decoder = "language_model" in name or "lm_head" in name
        used = stage.decoder if decoder else stage.vision
        if used and "embed_tokens" not in name and "post_layernorm" not in name:
            chosen.append((name, parameter))
    matrices = [p for name, p in chosen if p.ndim == 2 and ".layers." in name]
    matrices += [p for name, p in chosen if p.ndim == 2 and "multi_modal_projector" in name]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in chosen if id(p) not in taken]
    return matrices, rest + (list(teacher.parameters()) if stage.vision else [])


def answer_loss(logits: Tensor, text: PackedText) -> Tensor:
    """Weighted cross-entropy of the answer tokens of `logits [B, S, V]`."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), text.labels.flatten(), ignore_index=IGNORE, reduction="none")
    weight = text.weight.flatten()
    return (loss * weight).sum() / weight.sum()


def right_answers(logits: Tensor, text: PackedText) -> list[list[bool]]:
    """For each question whether every answer token is the most likely one, which greedy decoding would then emit."""
    wrong = (logits.argmax(-1) != text.labels) & (text.labels != IGNORE) & (text.weight > 0)
    count = int(text.segment.max())
    bad = torch.zeros(len(wrong), count + 1, device=wrong.device).scatter_add_(1, text.segment, wrong.float())
    return (bad[:, 1:] == 0).tolist()


def symbolic_prefix(
    stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Prefix of a scene without its picture: BOS and noisy targets of a few vision tokens at their own positions."""
    embedding = model.model.language_model.embed_tokens.weight
    chosen = symbolic_choice(labels.cpu(), stage.symbols, generator).to(labels.device)
    picked = labels.gather(1, chosen[..., None].expand(-1, -1, labels.shape[-1]))
    symbols = teacher.targets(picked, embedding)
    symbols = symbols + stage.noise * torch.randn(symbols.shape, generator=generator).to(symbols.device)
    bos = embedding[token_ids()[BOS]].expand(len(labels), 1, -1)
    positions = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], dim=1)
    return torch.cat([bos, symbols.to(bos.dtype)], dim=1), positions


def stage_loss(
    stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, float], list[list[bool]]]:
    """Loss of one batch, its parts by name, and which questions were answered right (empty without text)."""
    device = model.device
    labels = batch.labels.to(device)
    embedding = model.model.language_model.embed_tokens.weight
    total = torch.zeros((), device=device)
    parts: dict[str, float] = {}
    prefix: tuple[Tensor, Tensor] | None = None
    if batch.pixels is not None:
        features, vision = vision_features(model, batch.pixels.to(device))
        dense, summary, align = teacher.losses(features, vision, labels, embedding)
        total = total + stage.align * (0.3 * dense + 0.3 * summary + align)
        parts |= {"dense": float(dense.detach()), "summary": float(summary.detach()), "align": float(align.detach())}
        prefix = image_prefix(model, vision, token_ids()[BOS])
    if batch.text is None:
        return total, parts, []
    text = batch.text.to(device)
    vectors, positions = prefix or symbolic_prefix(stage, model, teacher, labels, generator)
    logits = packed_logits(model, vectors, positions, text, start=VISION_TOKENS + 1)
    answer = answer_loss(logits, text)
    parts["answer"] = float(answer.detach())
    return total + answer, parts, right_answers(logits.detach(), text)
