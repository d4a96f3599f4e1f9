"""Models that `compare.py` asks, each with a processor and pictures: what the transformers side needs.

The embedded LLaVA about scenes; and random models of the other families, which tell tokens apart all the better, about
pictures of coloured blocks whose sizes no image processor has to change by other than whole factors: the two
environments resize by different libraries. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = 195
"""Plain words of the tokenizer; special ones follow."""
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<image>", "<video>"]
IDS = {word: WORDS + number for number, word in enumerate(SPECIAL)}
SIZES = {
    "qwen2_5": [(168, 168), (224, 112), (112, 224), (280, 140)],
    "qwen3": [(192, 192), (256, 128), (128, 256), (320, 160)],
    # Four tiles; unpadded left and right; one tile; sixteen, which are interpolated to fewer tokens.
    "onevision": [(112, 112), (168, 112), (56, 56), (224, 224)],
}
"""Height and width of the pictures, in pixels."""
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112], [168, 168], [224, 224]]


@dataclass(frozen=True)
class Subject:
    """A model, and how it is asked."""

    model: Any
    inputs: Callable[[str, list[Image.Image]], dict[str, Any]]
    """From a prompt with one placeholder a picture, and its pictures."""
    asked: list[dict[str, Any]]
    """Prompts, and their pictures as files in the folder."""
    processor: Any = None
    """For `tp.encode`; random models have none of their own."""


def make(name: str, folder: Path, several: bool) -> Subject:
    """The model `name` with its questions about one picture, or about several, written into `folder`."""
    return _llava(folder, several) if name == "llava" else _random(name, folder, several)


def _llava(folder: Path, several: bool) -> Subject:
    import tokenprune as tp

    model, processor = tp.load("embedded")
    cases = list(tp.scene_cases(5))
    for number, case in enumerate(cases):
        case.picture().save(folder / f"scene{number}.png")
    groups = [[number] for number in range(len(cases))]
    if several:  # two and three pictures of different scenes, side by side
        groups = [[at, (at + 17) % 46, (at + 29) % 46][: 2 + at // 4 % 2] for at in range(0, 46, 4)]
    asked = [
        {
            "prompt": f"{'<image>' * len(group)}{cases[group[0]].question}<answer>",
            "pictures": [f"scene{number}.png" for number in group],
        }
        for group in groups
    ]

    def inputs(prompt: str, pictures: list[Image.Image]) -> dict[str, Any]:
        return dict(processor(images=pictures, text=prompt, return_tensors="pt"))

    return Subject(model.float(), inputs, asked, processor)


def _random(name: str, folder: Path, several: bool) -> Subject:
    home = folder / name
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(home)
    config, files, inputs_of = _onevision(tokenizer) if name == "onevision" else _qwen(name, tokenizer)
    import transformers as tf

    torch.manual_seed(0)
    model = getattr(tf, config.architectures[0])(config).float().eval()
    with torch.no_grad():
        for title, weight in model.named_parameters():
            if title.endswith("embed_tokens.weight"):
                weight.mul_(10)
            elif title.endswith("image_newline"):
                weight.normal_(std=0.5)
            elif weight.ndim == 2 and "embed" not in title:
                # Attention that looks at few tokens: answers depend on which ones are there.
                sharp = "language_model" in title and title.endswith(("q_proj.weight", "k_proj.weight"))
                calm = name == "onevision" and "vision_tower" in title
                weight.mul_(6 if sharp else 1 if calm else 3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(home)
    for file, content in files.items():
        (home / file).write_text(json.dumps(content))
    _pictures(name, folder)
    mark = "<image> " if name == "onevision" else "<|vision_start|> <|image_pad|> <|vision_end|> "
    groups = [[0, 1], [2, 0, 3], [1, 2]] if several else [[number] for number in range(4)]
    asked = []
    for number, group in enumerate(groups):
        words = [f"w{(7 * number + 3 * step) % 180 + 3}" for step in range(9)]
        marks = [mark, mark, f"w9 {mark}"][: len(group)]  # two side by side, a third behind a word
        asked.append(
            {
                "prompt": f"w5 w6 {''.join(marks)}{' '.join(words)}",
                "pictures": [f"{name}{picture}.png" for picture in group],
            }
        )
    return Subject(model, inputs_of(model), asked)


def _pictures(name: str, folder: Path) -> None:
    """Coloured blocks, eight by eight or one to a vision token."""
    noise = np.random.default_rng(0)
    token = {"qwen2_5": 28, "qwen3": 32}.get(name)
    for number, (height, width) in enumerate(SIZES[name]):
        blocks = (8, 8) if token is None else (height // token, width // token)
        colours = noise.integers(0, 255, (*blocks, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{name}{number}.png")


def _tokenizer() -> Any:
    """Words w3, w4 and so on, and the placeholders of all families."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *[f"w{number}" for number in range(3, WORDS)], *SPECIAL, "<unk>"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
    )


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 208,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


Made = tuple[Any, dict[str, Any], Callable[[Any], Callable[[str, list[Image.Image]], dict[str, Any]]]]
"""A configuration, the files that a processor is loaded from, and from a model what makes its inputs."""


def _qwen(name: str, tokenizer: Any) -> Made:
    import transformers as tf
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    third = name == "qwen3"
    patch = 16 if third else 14
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "in_channels": 3,
    }
    if third:
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    kind = tf.Qwen3VLConfig if third else tf.Qwen2_5_VLConfig
    config = kind(
        text_config=_text(rope_parameters=rope, **({"head_dim": 32} if third else {})),
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    family = "Qwen3VL" if third else "Qwen2_5_VL"
    config.architectures = [f"{family}ForConditionalGeneration"]
    pixels = {"min_pixels": 784, "max_pixels": 147456}
    shared = {
        **NORM,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]},
        "processor_class": f"{family}Processor",
    }
    video = "Qwen3VLVideoProcessor" if third else "Qwen2VLVideoProcessor"
    files = {
        "preprocessor_config.json": {**shared, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {**shared, "video_processor_type": video},
    }
    images = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, **NORM, **pixels)

    def inputs_of(model: Any) -> Callable[[str, list[Image.Image]], dict[str, Any]]:
        def inputs(prompt: str, pictures: list[Image.Image]) -> dict[str, Any]:
            made = dict(images(images=pictures, return_tensors="pt"))
            ids = _expanded(tokenizer, prompt, "<|image_pad|>", (made["image_grid_thw"].prod(-1) // 4).tolist())
            return {**made, "input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).long()}

        return inputs

    return config, files, inputs_of


def _onevision(tokenizer: Any) -> Made:
    import transformers as tf
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    vision = tf.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**_text(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaOnevisionForConditionalGeneration"]
    pixels = {**NORM, "size": {"height": 56, "width": 56}, "resample": 0, "image_grid_pinpoints": PINPOINTS}
    told = {"processor_class": "LlavaOnevisionProcessor"}
    files = {
        "preprocessor_config.json": {**pixels, **told, "image_processor_type": "LlavaOnevisionImageProcessor"},
        "video_preprocessor_config.json": {
            **{key: pixels[key] for key in (*NORM, "size")},
            **told,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "processor_config.json": {
            **told,
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    }
    images = LlavaOnevisionImageProcessorPil(**pixels)

    def inputs_of(model: Any) -> Callable[[str, list[Image.Image]], dict[str, Any]]:
        def inputs(prompt: str, pictures: list[Image.Image]) -> dict[str, Any]:
            made = dict(images(images=pictures, return_tensors="pt"))
            with torch.no_grad():
                features = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output
            return {**made, "input_ids": _expanded(tokenizer, prompt, "<image>", [len(one) for one in features])}

        return inputs

    return config, files, inputs_of


def _expanded(tokenizer: Any, prompt: str, mark: str, counts: Sequence[int]) -> torch.Tensor:
    """Token ids of a prompt, with so many placeholders for each picture."""
    first, *rest = prompt.split(mark)
    text = first + "".join(f"{mark} " * many + after for many, after in zip(counts, rest, strict=True))
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids
