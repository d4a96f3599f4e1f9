"""`Tiny`: what one family's tiny model is made of, and what a prompt for it looks like."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers as tf
from torch import Tensor

Size = tuple[int, int]

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, SEPARATOR = 0, 1, 2, 195, 196, 197, 198, 199
"""Special token ids of every model here; text tokens are 3 to 189."""

VOCAB = 200


class Tiny(ABC):
    """A family: its tiny configuration, the sizes of its pictures, and its inputs beside ids and mask."""

    name: ClassVar[str]
    """`model_type` of the configuration, or what tells a second model of the same family apart."""
    variant: ClassVar[str] = ""
    """What tells this model from another one of the same family, in the table of docs/models.md."""
    sizes: ClassVar[tuple[Size, ...]]
    """Picture sizes worth testing, 14 to 30 vision tokens each, all different where the family takes several."""
    marks: ClassVar[bool] = False
    """Whether the text tokens that touch an image are the marks of its start and end."""
    kinds: ClassVar[str | None] = None
    """The input that is 1 on vision tokens, where the family has one."""
    expands: ClassVar[bool] = True
    """Whether transformers gives each beam and each answer its own pictures where samples have different numbers of
    them: that of GLM-4V does not (5.24), untouched as it is."""
    rounds: ClassVar[bool] = False
    """Whether rounding in float32 moves the untouched model's logits by about 1e-5 or more, SDPA against eager: the
    matrix then runs in float64, and asks for 1e-10."""
    by_image: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    """The inputs whose first axis is the images."""

    @abstractmethod
    def config(self) -> tuple[Any, Any]:
        """The model's class and its configuration."""

    def finish(self, model: Any) -> None:  # noqa: B027
        """Whatever random weights need to be as trained ones are: nothing, as a rule."""

    @abstractmethod
    def tokens(self, model: Any, size: Size) -> int:
        """Vision tokens of one image."""

    @abstractmethod
    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        """Noise for these images: every vision token differs from every other."""

    def check(self, size: Size) -> None:
        """Raise `ValueError` for a size that the family does not take."""
        if size not in self.sizes:
            raise ValueError(f"image size {size} of {self.name}: expected one of {self.sizes}")

    def placeholders(self, model: Any, size: Size) -> Tensor:
        """What stands for one image in the ids, int64 [n]: some families put text between its parts."""
        return torch.full((self.tokens(model, size),), IMAGE)

    def pixels(self, model: Any, rows: Sequence[Sequence[Size]], random: torch.Generator) -> dict[str, Tensor]:
        """`noise` for the images of each sample: as a rule those of all samples stand in one list."""
        return self.noise(model, [size for images in rows for size in images], random)

    def row(self, batch: Any, b: int) -> dict[str, Tensor]:
        """The inputs of the images of sample `b` of a batch (`families.Batch`)."""
        first, last = sum(batch.images[:b]), sum(batch.images[: b + 1])
        return self.images(batch, first, last) if last > first else {}

    def images(self, batch: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        """The inputs of the images `first` to `last` of a batch, without the latter."""
        return {name: batch[name][first:last] for name in self.by_image if name in batch}


class Square(Tiny):
    """Pictures of one size, ``[images, 3, side, side]``."""

    side: ClassVar[int]
    """Of the picture, in pixels."""
    count: ClassVar[int]
    """Vision tokens of the picture."""

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "side"):
            cls.sizes = ((cls.side, cls.side),)

    def tokens(self, model: Any, size: Size) -> int:
        return self.count

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(len(images), 3, self.side, self.side, generator=random)}


def text(**changes: Any) -> dict[str, Any]:
    """Arguments of a decoder's configuration: 8 layers, 4 heads of 16, 2 key-value heads."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"vocab_size": VOCAB, "num_hidden_layers": 8, "max_position_embeddings": 512}
    return shape | rest | {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS} | changes


def vit(image_size: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a tower's configuration: 3 layers, patches of 4 x 4 pixels."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return shape | {"image_size": image_size, "patch_size": 4} | changes


def clip(image_size: int, **changes: Any) -> tf.CLIPVisionConfig:
    """A tower of 3 layers, the last of which LLaVA does not use."""
    return tf.CLIPVisionConfig(**vit(image_size, projection_dim=32), **changes)


def scale(model: Any, pattern: str, factor: float) -> None:
    """Multiply the weights whose names match `pattern`, a regular expression."""
    weights = [weight for name, weight in model.named_parameters() if re.search(pattern, name)]
    assert weights, f"no weight of {type(model).__name__} is called {pattern}"
    for weight in weights:
        weight.mul_(factor)


def clear_patches(model: Any) -> None:
    """Make patches and their places count beside the tower's biases: transformers starts most of them at 0.02."""
    scale(model, r"(patch|pos)\w*_embed\w*(\.proj)?\.weight", 8.0)


def calm_siglip(model: Any) -> None:
    """Undo what `families.build` does to SigLIP's layers, which transformers starts large: their tokens would agree."""
    scale(model, r"(vision_model|vision_tower)\.encoder\.layers\..*(proj|fc\d)\.weight", 0.25)


def siglip(image_size: int, **changes: Any) -> tf.SiglipVisionConfig:
    """A tower without a class token."""
    return tf.SiglipVisionConfig(**vit(image_size, vision_use_head=False), **changes)
