"""The four stages of training, after those of real VLMs.

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
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.scenes.training.alignment import Teacher
from tokenprune.scenes.training.batches import Batch
from tokenprune.scenes.training.packing import IGNORE, PackedText, image_prefix, packed_logits, vision_features
from tokenprune.scenes.world.vocabulary import BOS, VISION_TOKENS, token_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `steps` of the shipped run (other lengths keep the proportions), `batch` scenes a step with `questions`, `captions`
    and `tallies` each, `texts` in every `text_every`th step, peak learning `rate` held for the share `hold` of the
    steps, then falling to the share `final` of it; the shares of that rate at which `decoder` and `vision` learn (0:
    frozen), and the weight of `align`.
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


STAGES = (
    Stage("text", 400, 0, 0, 0, 0, 3e-3, 0.3, 0.6, decoder=1.0, vision=0.0, align=0.0, texts=6),
    Stage("language", 2000, 6, 6, 2, 1, 3e-3, 0.1, 0.6, decoder=1.0, vision=0.0, align=0.0, texts=6, text_every=8),
    Stage("alignment", 1500, 16, 0, 0, 0, 3e-3, 0.1, 0.6, decoder=0.0, vision=1.0, align=1.0),
    Stage("instruction", 1400, 8, 8, 1, 1, 2e-3, 0.01, 0.4, decoder=0.5, vision=1.0, align=0.2, texts=6, text_every=8),
)


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike: `matrices` of hidden layers by Muon, the `rest` by AdamW, at a share of the rate."""

    share: float
    matrices: list[nn.Parameter]
    rest: list[nn.Parameter]


def parameter_groups(stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher) -> list[Group]:
    """Parameters that a stage trains.

    Word embeddings stay as initialised: random codes are far apart, and the other stages aim at them.
    """
    decoder, vision = Group(stage.decoder, [], []), Group(stage.vision, [], [])
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
    """Prefix of a scene without its picture: BOS and, for each vision token, its target with noise."""
    symbols = teacher.targets(labels, model.model.language_model.embed_tokens.weight)
    symbols = symbols + stage.noise * torch.randn(symbols.shape, generator=generator).to(symbols.device)
    return image_prefix(model, symbols, token_ids()[BOS])


def text_loss(model: LlavaForConditionalGeneration, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next word in texts `ids [B, 1 + L]`, without a picture.

    Their position ids are those behind a picture, which no control renumbers.
    """
    inputs = ids[:, :-1]
    positions = VISION_TOKENS + 1 + torch.arange(inputs.shape[1], device=ids.device)[None]
    output = model.model.language_model(input_ids=inputs, position_ids=positions, use_cache=False)
    logits = model.lm_head(output.last_hidden_state)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def stage_loss(
    stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher, batch: Batch, generator: torch.Generator
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
