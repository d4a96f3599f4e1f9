"""Tiny random models of real vision-language architectures, and raw-tensor inputs for them.

Every model has 8 decoder layers of width 64, a vocabulary of 200 and weights large enough for tests to see an error:
attention is far from uniform and hiding vision tokens moves the logits. No tokenizer, no processor, no download. What
differs from family to family is in `family_models`.

    model = build("qwen3_vl")
    batch = inputs("qwen3_vl", model, rows=[Row(), Row(images=((8, 12), (12, 10)), after=9)])
    model(**batch).logits                      # [2, L, 200], the shorter row padded on the left
    model(**row_inputs(batch, 1)).logits       # the second sample alone, without padding
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import transformers as tf
from family_models import MODELS
from family_models.tiny import BOS, EOS, IMAGE, PAD, VISION_END, VISION_START, VOCAB, Size, Tiny
from torch import Tensor
from transformers import PreTrainedModel

Side = Literal["left", "right"]
Attention = Literal["sdpa", "eager"]

FAMILIES: tuple[str, ...] = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The families that every test runs for, in that order; all of `MODELS` run in `test_matrix.py`."""

CACHE = "cache" if "cache" in inspect.signature(tf.LlamaModel.forward).parameters else "past_key_values"
"""What a model calls its cache, among its arguments and in its output: transformers 5.24 renamed it."""

_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Row:
    """One sample: `before` text tokens, then images with `between` text tokens between them, then `after` text tokens.

    `images` are (height, width), in pixels for the LLaVA families (those that `sizes` lists), in patches for the Qwen
    families (even numbers; a vision token is 2 x 2 patches). `None` is one image of the family's first size, `()` none.
    In prompts of families with marks, as Qwen's, the text tokens that touch an image are those of its start and end.
    """

    before: int = 3
    images: Sequence[Size] | None = None
    between: int = 2
    after: int = 7


class Batch(dict[str, Tensor]):
    """Keyword arguments of a model's `forward` and `generate`; `images[b]` is the number of images in row b."""

    def __init__(self, tensors: Mapping[str, Tensor], images: Sequence[int], tiny: Tiny) -> None:
        super().__init__(tensors)
        self.images = tuple(images)
        self.tiny = tiny


def sizes(family: str) -> tuple[Size, ...]:
    """Image sizes worth testing, 14 to 30 vision tokens each, all different (LLaVA has just one size)."""
    return MODELS[family].sizes


def ragged_rows(family: str) -> list[Row]:
    """Two rows with different numbers of vision and of text tokens; the second has two images, of different sizes where
    the family knows several."""
    first, last = sizes(family)[0], sizes(family)[-1]
    return [Row(before=3, images=(first,), after=9), Row(before=5, images=(last, first), between=2, after=5)]


def build(family: str, *, attention: Attention = "sdpa", seed: int = 0, layers: int = 8) -> PreTrainedModel:
    """A fresh tiny model in evaluation mode, float32; the same seed gives the same weights. Takes 0.1 s.

    `generate` never stops early and never emits a special token (an image token in the answer would be taken for an
    image): there is no end-of-sequence token, and the special ids stand in `generation_config.suppress_tokens`.
    """
    model_class, config = MODELS[family].config()
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class._from_config(config, attn_implementation=attention)
        words = {id(weight) for weight in model.get_decoder().parameters()}
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and bool((weight == weight.flatten()[0]).all()):
                weight.normal_(std=0.2)  # transformers starts it at a constant: all vision tokens would be one
            elif name.endswith("embed_tokens.weight"):
                weight.mul_(10.0)  # words must count beside the far larger vision features
            elif weight.ndim in (2, 3) and "embed" not in name:  # three: one matrix for each expert
                peaked = id(weight) in words and name.endswith(("q_proj.weight", "k_proj.weight"))
                weight.mul_(8.0 if peaked else 4.0)
            elif weight.ndim == 1:  # norms start at 1 and biases at 0: code that forgets them must not pass a test
                weight.add_(0.1 * torch.randn_like(weight))
        MODELS[family].finish(model)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, BOS, EOS, *range(190, VOCAB)]
    return model.eval()


def inputs(
    family: str,
    model: PreTrainedModel,
    *,
    rows: Sequence[Row] | None = None,
    side: Side = "left",
    seed: int = 0,
) -> Batch:
    """Raw tensors for a batch of `rows` (default: `ragged_rows`), padded on `side`; the same seed gives the same batch.

    input_ids, attention_mask          int64 [B, L]
    mm_token_type_ids (Qwen)           int64 [B, L], 1 on vision tokens
    pixel_values                       [images, 3, H, W] LLaVA; [images, tiles, 3, H, W] LLaVA-NeXT; [patches, 96] Qwen
    image_sizes (LLaVA-NeXT)           int64 [images, 2]
    image_grid_thw (Qwen)              int64 [images, 3], in patches

    The last two, and pixel_values, are absent when no row has an image.
    """
    tiny, rows = MODELS[family], ragged_rows(family) if rows is None else rows
    images = [sizes(family)[:1] if row.images is None else tuple(row.images) for row in rows]
    random = torch.Generator().manual_seed(seed)
    samples = []
    for row, row_images in zip(rows, images, strict=True):
        if tiny.marks and len(row_images) > 1 and row.between < 1:
            raise ValueError("transformers tells two images of a Qwen prompt apart by the text between them")
        pieces = [_words(row.before, random)]
        for i, size in enumerate(row_images):
            tiny.check(size)
            pieces += [_words(row.between if i else 0, random), tiny.placeholders(model, size)]
        sample = torch.cat([*pieces, _words(row.after, random)])
        if tiny.marks:
            text, image = sample != IMAGE, sample == IMAGE
            sample[1:][text[1:] & image[:-1]] = VISION_END
            sample[:-1][text[:-1] & image[1:]] = VISION_START  # wins where there is room for one mark only
        samples.append(sample)
    tensors = {
        "input_ids": _pad(samples, PAD, side),
        "attention_mask": _pad([torch.ones_like(sample) for sample in samples], 0, side),
    }
    if tiny.kinds is not None:
        tensors[tiny.kinds] = (tensors["input_ids"] == IMAGE).long()
    if any(images):
        tensors |= tiny.pixels(model, images, random)
    return Batch(tensors, [len(row_images) for row_images in images], tiny)


def text_only_inputs(
    family: str, model: PreTrainedModel, *, lengths: Sequence[int] = (6, 9), side: Side = "left", seed: int = 0
) -> Batch:
    """A batch without any image, row b of `lengths[b]` text tokens."""
    return inputs(family, model, rows=[Row(before=n, images=(), after=0) for n in lengths], side=side, seed=seed)


def row_inputs(batch: Batch, b: int) -> Batch:
    """Sample `b` of the batch alone: its own pixels, and no padding tokens."""
    real = batch["attention_mask"][b].bool()
    tensors = {name: batch[name][b : b + 1, real] for name in _PER_TOKEN if name in batch}
    tensors |= batch.tiny.row(batch, b)
    return Batch(tensors, [batch.images[b]], batch.tiny)


def next_turn(batch: Batch, sequences: Tensor, *, words: int = 5, seed: int = 1) -> Batch:
    """Text-only second turn on the same cache: `sequences [B, L + new]` that generate returned, and `words` new tokens.

    Give it to `generate` together with the first turn's cache, as `CACHE`.
    """
    random = torch.Generator().manual_seed(seed)
    added = torch.stack([_words(words, random) for _ in sequences])
    tensors = {"input_ids": torch.cat([sequences, added], dim=1)}
    grown = tensors["input_ids"].shape[1] - batch["input_ids"].shape[1]
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in batch:
            tensors[name] = torch.nn.functional.pad(batch[name], (0, grown), value=value)
    return Batch(tensors, [0] * len(sequences), batch.tiny)


def vision_mask(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """True on image and video placeholders: bool ``[B, L]`` from input_ids ``[B, L]``."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))


def _words(count: int, random: torch.Generator) -> Tensor:
    """Random text tokens, int64 [count]."""
    return torch.randint(3, 190, (count,), generator=random)


def _pad(samples: Sequence[Tensor], value: int, side: Side) -> Tensor:
    """int64 [B, longest] from samples of different lengths."""
    return torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=value, padding_side=side)
