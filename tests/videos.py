"""Prompts with videos for the tiny models of the families that take them, batched and row by row.

model = build_video("llava_onevision")
subject = video_subject("llava_onevision", model, [Clip(frames=(4,)), Clip(frames=(4,), images=1, after=5)])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import transformers as tf
from families import build
from family_models import MODELS
from family_models.llava import LlavaNextVideo, LlavaOnevision
from family_models.tiny import IMAGE, PAD, SEPARATOR, VIDEO, VISION_END, VISION_START, Tiny, clip, siglip, text
from torch import Tensor

from tokenprune.core.grids import ClassToken, Grid, Tiles
from tokenprune.testing.checks import Subject

WIDE = [[24, 24], [24, 48], [48, 24]]
SIDE = 24
"""Pixels of a frame, where the tiny models of pictures have frames of one token."""


@dataclass(frozen=True)
class Clip:
    """One prompt: words, videos of so many frames, pictures, words."""

    before: int = 3
    frames: tuple[int, ...] = (4,)
    images: int = 0
    after: int = 7


class Kind(ABC):
    """How a family takes videos."""

    frame: ClassVar[int]
    """Vision tokens of a frame."""
    tiny: ClassVar[Tiny | None] = None
    """Another tiny model than that of pictures, where its frames would have one token."""

    @abstractmethod
    def video(self, frames: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What stands for a video in the ids, and its inputs."""

    @abstractmethod
    def image(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for a picture."""

    @abstractmethod
    def grids(self, frames: int) -> tuple[Grid, ...]:
        """Of a video."""

    @abstractmethod
    def image_grids(self) -> tuple[Grid, ...]:
        """Of the picture."""

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        """Inputs that follow from the ids."""
        return {}

    def joined(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """An input of all rows."""
        return torch.cat(list(values))


def noise(*shape: int, random: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=random)


class Qwen(Kind):
    """Frames of 8 x 8 patches in one grid, M-RoPE."""

    frame = 16

    def video(self, frames: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.placed(frames, VIDEO, frames), self.patches("videos", "video_grid_thw", frames, random)

    def image(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.patches("", "image_grid_thw", 1, random)
        return self.placed(1, IMAGE, 1), {name.rstrip("_"): value for name, value in made.items()}

    def placed(self, frames: int, token: int, grid: int) -> Tensor:
        return torch.tensor([VISION_START, *[token] * (self.frame * frames), VISION_END])

    def patches(self, what: str, grid: str, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        pixels = noise(frames * 64, 96, random=random)
        return {f"pixel_values_{what}": pixels, grid: torch.tensor([[frames, 8, 8]])}

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}

    def grids(self, frames: int) -> tuple[Grid, ...]:
        return ((frames, 4, 4),)

    def image_grids(self) -> tuple[Grid, ...]:
        return ((1, 4, 4),)


class Qwen3(Qwen):
    """A timestamp of two words before each frame, which has marks of its own."""

    def placed(self, frames: int, token: int, grid: int) -> Tensor:
        frame = [VISION_START, *[token] * self.frame, VISION_END]
        return torch.tensor([word for t in range(frames) for word in (20 + t, 30, *frame)])

    def grids(self, frames: int) -> tuple[Grid, ...]:
        return ((1, 4, 4),) * frames


class OneRun(Kind):
    """A video is one run of its own placeholder, ``[videos, frames, 3, side, side]``."""

    frame = 9
    behind = 0
    """Tokens behind the last frame."""

    def video(self, frames: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = noise(1, frames, 3, SIDE, SIDE, random=random)
        return torch.full((frames * self.frame + self.behind,), VIDEO), {"pixel_values_videos": pixels}

    def image(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = noise(1, 2, 3, SIDE, SIDE, random=random)  # an overview and a tile
        return torch.full((36 + 6 * 7,), IMAGE), {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, SIDE]])}

    def grids(self, frames: int) -> tuple[Grid, ...]:
        return ((frames, 3, 3), *[ClassToken()] * self.behind)

    def image_grids(self) -> tuple[Grid, ...]:
        return (1, 6, 6), Tiles(1, 6, 7)


class WideNextVideo(LlavaNextVideo):
    """Frames of 3 x 3 tokens, pooled from 6 x 6 patches."""

    def config(self) -> tuple[Any, Any]:
        model, config = super().config()
        words = tf.LlamaConfig(**text())
        more = {"image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": WIDE}
        return model, type(config)(vision_config=clip(SIDE), text_config=words, **more)


class WideOnevision(LlavaOnevision):
    """Frames of 3 x 3 tokens, interpolated from 6 x 6 patches."""

    def config(self) -> tuple[Any, Any]:
        model, _ = super().config()
        return model, tf.LlavaOnevisionConfig(
            vision_config=siglip(SIDE),
            text_config=tf.Qwen2Config(**text()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=WIDE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )


class NextVideo(OneRun):
    tiny = WideNextVideo()


class Onevision(OneRun):
    tiny, behind = WideOnevision(), 1


class WithClassTokens(OneRun):
    """Video-LLaVA: frames of 5 x 5 tokens and a class token."""

    frame = 26

    def video(self, frames: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = noise(1, frames, 3, 20, 20, random=random)
        return torch.full((frames * self.frame,), VIDEO), {"pixel_values_videos": pixels}

    def image(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.full((25,), IMAGE), {"pixel_values": noise(1, 3, 20, 20, random=random)}

    def grids(self, frames: int) -> tuple[Grid, ...]:
        return (ClassToken(), (1, 5, 5)) * frames

    def image_grids(self) -> tuple[Grid, ...]:
        return ((1, 5, 5),)


class Pictures(Kind):
    """InternVL: each frame is a picture behind two words."""

    frame = 16
    shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    around: ClassVar[tuple[list[int], list[int]]] = ([20, 21], [])
    """Words before and behind each frame."""
    square: ClassVar[Grid] = (1, 4, 4)

    def video(self, frames: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        before, behind = self.around
        one = torch.tensor([*before, *[IMAGE] * self.frame, *behind])
        return one.repeat(frames), {"pixel_values": noise(frames, *self.shape, random=random)}

    def image(self, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.video(1, random)

    def grids(self, frames: int) -> tuple[Grid, ...]:
        return (self.square,) * frames

    def image_grids(self) -> tuple[Grid, ...]:
        return (self.square,)


class Smol(Pictures):
    """SmolVLM: a timestamp and a separator before each frame, ``[B, frames, 3, side, side]`` padded with zeros."""

    frame, shape, around, square = 9, (3, 24, 24), ([22, SEPARATOR], [SEPARATOR]), (1, 3, 3)

    def joined(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


KINDS: dict[str, Kind] = {
    "qwen2_vl": Qwen(),
    "qwen2_5_vl": Qwen(),
    "qwen3_vl": Qwen3(),
    "llava_onevision": Onevision(),
    "llava_next_video": NextVideo(),
    "internvl": Pictures(),
    "smolvlm": Smol(),
    "video_llava": WithClassTokens(),
}
"""The families whose videos are promised (docs/models.md)."""


def build_video(family: str, **more: Any) -> Any:
    """The tiny model of the family, with frames of several tokens."""
    with patch.dict(MODELS, {family: KINDS[family].tiny or MODELS[family]}):
        return build(family, **more)


def video_subject(family: str, model: Any, clips: Sequence[Clip], seed: int = 0) -> Subject:
    """A batch of prompts with videos, padded on the left, and each of them alone."""
    kind, random = KINDS[family], torch.Generator().manual_seed(seed)
    rows, ids = [], []
    for clip_ in clips:
        words = torch.randint(
            40, 190, (clip_.before + clip_.after + len(clip_.frames) + clip_.images,), generator=random
        )
        pieces, inputs, at = [words[: clip_.before]], dict[str, list[Tensor]](), clip_.before
        items = [kind.video(frames, random) for frames in clip_.frames]
        items += [kind.image(random) for _ in range(clip_.images)]
        for placeholders, own in items:
            pieces += [placeholders, words[at : at + 1]]  # a word between two
            at += 1
            for name, value in own.items():
                inputs.setdefault(name, []).append(value)
        ids.append(torch.cat([*pieces, words[at:]]))
        rows.append({name: torch.cat(values) for name, values in inputs.items()})
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True, padding_side="left")
    batch: dict[str, Any] = {"input_ids": padded, "attention_mask": mask, **kind.beside(padded)}
    for name in dict.fromkeys(name for row in rows for name in row):
        batch[name] = kind.joined(name, [row[name] for row in rows if name in row])
    alone: list[dict[str, Any]] = []
    for own, row in zip(ids, rows, strict=True):
        pixels = {name: kind.joined(name, [value]) for name, value in row.items()}
        alone.append(
            {"input_ids": own[None], "attention_mask": torch.ones_like(own)[None], **kind.beside(own[None])} | pixels
        )
    return Subject(model, batch, alone)


def grids_of(family: str, clip_: Clip) -> tuple[Grid, ...]:
    """What the report must tell of a prompt."""
    kind = KINDS[family]
    return (*(grid for n in clip_.frames for grid in kind.grids(n)), *kind.image_grids() * clip_.images)
