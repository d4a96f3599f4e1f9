"""Tiny random models of real vision-language architectures, and raw-tensor inputs for them.

Every model has 8 decoder layers of width 64, a vocabulary of 200 and weights large enough for tests to see an error:
attention is far from uniform and hiding vision tokens moves the logits. No tokenizer, no processor, no download.

    model = build("qwen3_vl")
    batch = inputs("qwen3_vl", model, rows=[Row(), Row(images=((8, 12), (12, 10)), after=9)])
    model(**batch).logits                      # [2, L, 200], the shorter row padded on the left
    model(**row_inputs(batch, 1)).logits       # the second sample alone, without padding
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Side = Literal["left", "right"]
Attention = Literal["sdpa", "eager"]
Size = tuple[int, int]

FAMILIES: tuple[str, ...] = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Every family, in the order tests run them."""

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 195, 196, 197, 198
"""Special token ids of every model here; text tokens are 3 to 189."""

CACHE = "cache" if "cache" in inspect.signature(tf.LlamaModel.forward).parameters else "past_key_values"
"""What a model calls its cache, among its arguments and in its output: transformers 5.24 renamed it."""

_QWEN_SIZES: tuple[Size, ...] = ((8, 8), (8, 12), (12, 10), (4, 20))
_SIZES: Mapping[str, tuple[Size, ...]] = {
    "llava": ((20, 20),),  # 25 vision tokens
    "llava_next": ((16, 16), (16, 8), (8, 24), (8, 14)),  # 24, 16, 18, 14: tiles, one newline a row, unpadding
    "qwen2_vl": _QWEN_SIZES,  # 16, 24, 30, 20
    "qwen2_5_vl": _QWEN_SIZES,
    "qwen3_vl": _QWEN_SIZES,
}
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Row:
    """One sample: `before` text tokens, then images with `between` text tokens between them, then `after` text tokens.

    `images` are (height, width), in pixels for the LLaVA families (those that `sizes` lists), in patches for the Qwen
    families (even numbers; a vision token is 2 x 2 patches). `None` is one image of the family's first size, `()` none.
    In Qwen prompts the text tokens that touch an image are the marks of its start and end.
    """

    before: int = 3
    images: Sequence[Size] | None = None
    between: int = 2
    after: int = 7


class Batch(dict[str, Tensor]):
    """Keyword arguments of a model's `forward` and `generate`; `images[b]` is the number of images in row b."""

    def __init__(self, tensors: Mapping[str, Tensor], images: Sequence[int]) -> None:
        super().__init__(tensors)
        self.images = tuple(images)


def sizes(family: str) -> tuple[Size, ...]:
    """Image sizes worth testing, 14 to 30 vision tokens each, all different (LLaVA has just one size)."""
    return _SIZES[family]


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
    model_class, config = _CONFIGS[family]()
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class._from_config(config, attn_implementation=attention)
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.mul_(10.0)  # words must count beside the far larger vision features
            elif weight.ndim == 2 and "embed" not in name:
                peaked = "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight"))
                weight.mul_(8.0 if peaked else 4.0)
            elif weight.ndim == 1:  # norms start at 1 and biases at 0: code that forgets them must not pass a test
                weight.add_(0.1 * torch.randn_like(weight))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END]
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
    rows = ragged_rows(family) if rows is None else rows
    images = [sizes(family)[:1] if row.images is None else tuple(row.images) for row in rows]
    random = torch.Generator().manual_seed(seed)
    samples = []
    for row, row_images in zip(rows, images, strict=True):
        if family.startswith("qwen") and len(row_images) > 1 and row.between < 1:
            raise ValueError("transformers tells two images of a Qwen prompt apart by the text between them")
        pieces = [_words(row.before, random)]
        for i, size in enumerate(row_images):
            pieces += [_words(row.between if i else 0, random), torch.full((_token_count(family, model, size),), IMAGE)]
        sample = torch.cat([*pieces, _words(row.after, random)])
        if family.startswith("qwen"):
            text, image = sample != IMAGE, sample == IMAGE
            sample[1:][text[1:] & image[:-1]] = VISION_END
            sample[:-1][text[:-1] & image[1:]] = VISION_START  # wins where there is room for one mark only
        samples.append(sample)
    tensors = {
        "input_ids": _pad(samples, PAD, side),
        "attention_mask": _pad([torch.ones_like(sample) for sample in samples], 0, side),
    }
    if family.startswith("qwen"):
        tensors["mm_token_type_ids"] = (tensors["input_ids"] == IMAGE).long()
    every_image = [size for row_images in images for size in row_images]
    if every_image:
        tensors |= _pixels(family, model, every_image, random)
    return Batch(tensors, [len(row_images) for row_images in images])


def text_only_inputs(
    family: str, model: PreTrainedModel, *, lengths: Sequence[int] = (6, 9), side: Side = "left", seed: int = 0
) -> Batch:
    """A batch without any image, row b of `lengths[b]` text tokens."""
    return inputs(family, model, rows=[Row(before=n, images=(), after=0) for n in lengths], side=side, seed=seed)


def row_inputs(batch: Batch, b: int) -> Batch:
    """Sample `b` of the batch alone: its own pixels, and no padding tokens."""
    real = batch["attention_mask"][b].bool()
    tensors = {name: batch[name][b : b + 1, real] for name in _PER_TOKEN if name in batch}
    first, last = sum(batch.images[:b]), sum(batch.images[: b + 1])
    if last > first:
        for name in ("image_sizes", "image_grid_thw"):
            if name in batch:
                tensors[name] = batch[name][first:last]
        if "image_grid_thw" in batch:  # all images' patches lie in one list
            patches = batch["image_grid_thw"].prod(-1)
            first, last = int(patches[:first].sum()), int(patches[:last].sum())
        tensors["pixel_values"] = batch["pixel_values"][first:last]
    return Batch(tensors, [batch.images[b]])


def next_turn(batch: Batch, sequences: Tensor, *, words: int = 5, seed: int = 1) -> Batch:
    """Text-only second turn on the same cache: `sequences [B, L + new]` that generate returned, and `words` new tokens.

    Give it to `generate` together with the first turn's cache, as `CACHE`.
    """
    random = torch.Generator().manual_seed(seed)
    added = torch.stack([_words(words, random) for _ in sequences])
    tensors = {"input_ids": torch.cat([sequences, added], dim=1)}
    grown = tensors["input_ids"].shape[1] - batch["input_ids"].shape[1]
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in batch:
            tensors[name] = torch.nn.functional.pad(batch[name], (0, grown), value=value)
    return Batch(tensors, [0] * len(sequences))


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


def _token_count(family: str, model: Any, size: Size) -> int:
    """Vision tokens of one image."""
    if family.startswith("qwen"):
        if any(side % 2 for side in size):
            raise ValueError(f"image size {size} of {family}: expected even numbers of patches")
        return size[0] * size[1] // 4
    if size not in sizes(family):
        raise ValueError(f"image size {size} of {family}: expected one of {sizes(family)}")
    if family == "llava":
        return 25
    tiles = torch.empty(_tile_count(model, size), 4, 1)  # let the model itself lay out the tiles, unpad, add newlines
    return int(model.model.pack_image_features([tiles], [list(size)], "default", torch.empty(1))[1])


def _tile_count(model: Any, size: Size) -> int:
    """Tiles of one LLaVA-NeXT image, the overview included."""
    return image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, 8)


def _pixels(family: str, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
    """Noise pixels: every vision token differs from every other."""
    if family == "llava":
        return {"pixel_values": torch.randn(len(images), 3, 20, 20, generator=random)}
    if family == "llava_next":
        tiles = [torch.randn(_tile_count(model, size), 3, 8, 8, generator=random) for size in images]
        pixels = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(images)}
    grid = torch.tensor([(1, *size) for size in images])
    return {"pixel_values": torch.randn(int(grid.prod(-1).sum()), 96, generator=random), "image_grid_thw": grid}


def _text(**changes: Any) -> dict[str, Any]:
    """Arguments of a decoder's configuration: 8 layers, 4 heads of 16, 2 key-value heads."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"vocab_size": 200, "num_hidden_layers": 8, "max_position_embeddings": 512}
    return shape | rest | {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS} | changes


def _clip(image_size: int) -> tf.CLIPVisionConfig:
    """A tower of 3 layers, the last of which LLaVA does not use."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_attention_heads": 2}
    return tf.CLIPVisionConfig(num_hidden_layers=3, image_size=image_size, patch_size=4, **shape)


def _qwen(config_class: Any, vision: dict[str, Any], **text: Any) -> Any:
    """Configuration of a Qwen model: patches of 4 x 4 pixels and 2 frames, 2 x 2 patches a vision token, M-RoPE."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return config_class(
        vision_config={"depth": 3, "num_heads": 2, "patch_size": 4, "hidden_size": 32, **vision},
        text_config=_text(rope_parameters=rope, **text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _llava() -> tuple[Any, Any]:
    """CLIP and Llama, no grouped queries, as LLaVA-1.5."""
    text = tf.LlamaConfig(**_text(num_key_value_heads=4))
    config = tf.LlavaConfig(vision_config=_clip(20), text_config=text, image_token_index=IMAGE, image_seq_length=25)
    return tf.LlavaForConditionalGeneration, config


def _llava_next() -> tuple[Any, Any]:
    """CLIP on 8-pixel tiles (2 x 2 tokens each) and Mistral without sliding window, as LLaVA-1.6 Mistral."""
    text = tf.MistralConfig(**_text(sliding_window=None))
    tiles = [[8, 16], [16, 8], [16, 16], [8, 24], [24, 8]]
    config = tf.LlavaNextConfig(
        vision_config=_clip(8), text_config=text, image_token_index=IMAGE, image_grid_pinpoints=tiles
    )
    return tf.LlavaNextForConditionalGeneration, config


def _qwen2_vl() -> tuple[Any, Any]:
    """Bias in q, k, v."""
    return tf.Qwen2VLForConditionalGeneration, _qwen(tf.Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 64})


def _qwen2_5_vl() -> tuple[Any, Any]:
    """Bias in q, k, v; window attention in the vision tower but for its last block."""
    vision = {"out_hidden_size": 64, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [2]}
    return tf.Qwen2_5_VLForConditionalGeneration, _qwen(tf.Qwen2_5_VLConfig, vision)


def _qwen3_vl() -> tuple[Any, Any]:
    """Norms on q and k; DeepStack adds vision features after decoder layers 0 and 1."""
    vision = {"out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}
    deepstack = {"deepstack_visual_indexes": [0, 1]}
    return tf.Qwen3VLForConditionalGeneration, _qwen(tf.Qwen3VLConfig, vision | deepstack, head_dim=16)


_CONFIGS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
