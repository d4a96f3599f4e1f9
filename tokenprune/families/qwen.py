"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a tower for pictures of any size, 2 x 2 patches a vision token, M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.core.grids import Grid
from tokenprune.cost.shape import DecoderShape, ModelShape, QwenShape, VisionShape
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter, VisionCall, VisionRow, decoder_arguments
from tokenprune.families.sides import exact_sides, largest_sides
from tokenprune.families.tower import Order, Tower

HEAD = 80
"""Numbers per head of the published towers."""


class Mrope(Adapter):
    """Pictures of any size, whose rows and columns are in the position ids of their tokens."""

    pictures = "rows × columns of any size; M-RoPE"
    vision = ("visual",)
    sizes = "image_grid_thw"
    order: ClassVar[Order] = "units"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        """M-RoPE ids are the grid: one image (or stretch of video) per run of vision tokens.

        Without `mm_token_type_ids` the model itself gives vision tokens the ids of words; `image_grid_thw` tells then.
        """
        if row.positions is None or _as_words(row):
            merge = int(base.config.vision_config.spatial_merge_size)
            if row.pictures is not None:
                return tuple((t, h // merge, w // merge) for t, h, w in row.pictures)
            raise InputError(
                "the vision tokens have the position ids of words: pass mm_token_type_ids and image_grid_thw, as the "
                "processor gives them"
            )
        grids: list[Grid] = []
        at = 0
        for run in row.runs:
            ids = row.positions[:, at : at + run]
            height, width = (int(axis.max() - axis.min()) + 1 for axis in ids[1:])
            frames = run // (height * width)
            if frames * height * width != run:
                raise InputError(
                    f"{run} vision tokens are no whole grid of {height} x {width}, as their position ids say: half a "
                    "picture, or two without text between them?"
                )
            grids.append((frames, height, width))
            at += run
        return tuple(grids)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(size) // int(base.config.vision_config.spatial_merge_size) ** 2

    def in_grid_order(self, tower: Tower, rows: Tensor, call: VisionCall) -> Tensor:
        if not hasattr(tower.module, "window_size"):
            return rows
        return rows[_window_index(tower.module, call.grid).argsort().to(rows.device)]


class _Qwen(Mrope):
    """What the three have in common. Their configurations name the tower's numbers differently."""

    tower_width: ClassVar[str] = "hidden_size"
    """What `vision_config` calls the numbers per hidden state of the tower."""
    tower_out: ClassVar[str] = "out_hidden_size"
    """What `vision_config` calls the width of a vision token, which is that of the decoder."""

    def vision_shape(self, config: Any) -> VisionShape:
        vision = config.vision_config
        width, merge = int(getattr(vision, self.tower_width)), int(vision.spatial_merge_size)
        joined = width * merge**2
        return QwenShape(
            layers=int(vision.depth),
            width=width,
            patch=int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2),
            projector=((joined, joined), (joined, int(getattr(vision, self.tower_out)))),
            merge=merge,
            **self.tower_shape(vision),
        )

    def tower_shape(self, vision: Any) -> dict[str, Any]:
        """The arguments of `QwenShape` in which the three differ."""
        return {"mlp": int(vision.intermediate_size), "matrices": 2}

    def picture(self, config: Any, tokens: int | None = None) -> tuple[Grid, ...]:
        return ((1, *exact_sides(576 if tokens is None else tokens)),)

    def smaller_picture(self, config: Any, tokens: int) -> tuple[Grid, ...]:
        return ((1, *largest_sides(tokens)),)

    def pixels(
        self, config: Any, grids: Sequence[Grid], ids: Tensor, random: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        vision = config.vision_config
        merge = int(vision.spatial_merge_size)
        numbers = int(getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2)
        grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in grids] * len(ids))
        patches = torch.randn(int(grid.prod(-1).sum()), numbers, generator=random)
        kinds = (ids == int(config.image_token_id)).long()
        return {"pixel_values": patches.to(dtype), "image_grid_thw": grid, "mm_token_type_ids": kinds}

    def deepen_tower(self, config: Any, ratio: float) -> None:
        vision, layers = config.vision_config, config.get_text_config().num_hidden_layers
        before = vision.depth
        vision.depth = max(2, round(before * ratio))
        for levels in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if own := getattr(vision, levels, None):
                places = dict.fromkeys(min(vision.depth - 1, at * vision.depth // before) for at in own)
                # DeepStack adds one level after each of the first decoder layers: no more levels than layers.
                setattr(vision, levels, list(places)[:layers])

    def widen_tower(self, config: Any, ratio: float) -> None:
        vision, name = config.vision_config, self.tower_width
        before = getattr(vision, name)
        size = before // vision.num_heads
        setattr(vision, name, max(size, round(before * ratio / size) * size))
        vision.num_heads = getattr(vision, name) // size
        if getattr(vision, "intermediate_size", None):
            vision.intermediate_size = max(64, round(vision.intermediate_size * ratio / 4) * 4)
        setattr(vision, self.tower_out, config.get_text_config().hidden_size)


class Qwen2(_Qwen):
    """Qwen2-VL: `vision_config.hidden_size` is the decoder's width, and the tower's own is `embed_dim`."""

    family = "qwen2_vl"
    title = "Qwen2-VL"
    tower_width = "embed_dim"
    tower_out = "hidden_size"

    def tower_shape(self, vision: Any) -> dict[str, Any]:
        return {"mlp": int(vision.embed_dim * vision.mlp_ratio), "matrices": 2}


class Qwen2_5(_Qwen):
    """Qwen2.5-VL: a gated MLP, and windows of attention in all layers of the tower but a few."""

    family = "qwen2_5_vl"
    title = "Qwen2.5-VL"

    def tower_shape(self, vision: Any) -> dict[str, Any]:
        return {
            "mlp": int(vision.intermediate_size),
            "matrices": 3,
            "window": int(vision.window_size // vision.spatial_merge_size // vision.patch_size),
            "full": tuple(vision.fullatt_block_indexes),
        }

    def published(self, shape: ModelShape) -> Any:
        import transformers as tf

        decoder, vision = shape.decoder, shape.vision
        assert isinstance(vision, QwenShape)
        halves = decoder.head_dim // 2
        sections = [halves // 4, halves * 3 // 8, halves * 3 // 8]
        text = {
            **decoder_arguments(decoder),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections},
        }
        tower = {
            "depth": vision.layers,
            "hidden_size": vision.width,
            "num_heads": vision.width // HEAD,
            "intermediate_size": vision.mlp,
            "out_hidden_size": decoder.width,
            "fullatt_block_indexes": list(vision.full),
        }
        # The last words of the vocabulary serve as marks.
        marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        special = {name: decoder.vocab - 1 - number for number, name in enumerate(marks)}
        return tf.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **special)


class Qwen3(_Qwen):
    """Qwen3-VL: DeepStack adds features of several tower layers to the hidden states of the first decoder layers."""

    family = "qwen3_vl"
    title = "Qwen3-VL"
    pictures = "as Qwen2-VL; DeepStack adds features behind early layers"
    deepstack = "_deepstack_process"

    def tower_shape(self, vision: Any) -> dict[str, Any]:
        return {**super().tower_shape(vision), "projectors": 1 + len(vision.deepstack_visual_indexes)}


class Qwen3Moe(Qwen3):
    """Qwen3-VL with experts."""

    family = "qwen3_vl_moe"
    title = "Qwen3-VL MoE"

    def decoder_shape(self, text: Any) -> DecoderShape:
        self.refuse("ledger: no shape known for", "decoder_shape")  # which counts the experts that see a token


class Qwen3_5(Mrope):
    """Qwen3.5: three decoder layers of four are recurrent, and read the survivors alone."""

    family = "qwen3_5"
    title = "Qwen3.5"
    pictures = "as Qwen2-VL; three decoder layers of four are recurrent"


class Qwen3_5Moe(Qwen3_5):
    """Qwen3.5 with experts."""

    family = "qwen3_5_moe"
    title = "Qwen3.5 MoE"


class Qwen2_5Omni(Mrope):
    """The thinker of Qwen2.5-Omni: Qwen2.5-VL and a tower for sound, whose tokens stay."""

    family = "qwen2_5_omni_thinker"
    title = "Qwen2.5-Omni thinker"


class Qwen3Omni(Mrope):
    """The thinker of Qwen3-Omni: Qwen3-VL MoE and a tower for sound, whose tokens stay."""

    family = "qwen3_omni_moe_thinker"
    title = "Qwen3-Omni thinker"
    pictures = Qwen3.pictures
    deepstack = "_deepstack_process"


class PaddleOcr(Mrope):
    """PaddleOCR-VL: Ernie 4.5."""

    family = "paddleocr_vl"
    title = "PaddleOCR-VL"
    order = "raster"  # its projector puts the patches of a vision token together


def _as_words(row: VisionRow) -> bool:
    """Whether the position ids count the vision tokens like words, alike on all axes; one token alone is no proof."""
    assert row.positions is not None
    _, down, right = row.positions
    return bool(max(row.runs) > 1 and (down == right).all() and (down[1:] > down[:-1]).all())


def _window_index(tower: Any, grid: Any) -> Any:
    """``[N]`` which vision token stands at each place of the tower's own order, by the family's own function."""
    if hasattr(tower, "get_window_index"):  # older transformers
        return tower.get_window_index(grid)[0]
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]
