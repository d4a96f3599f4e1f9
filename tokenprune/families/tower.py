"""`Tower`: where the blocks of a vision tower are, and how its patches become vision tokens.

Told from the modules themselves as far as they can tell it: an adapter states what is left (`Adapter.order`, ...).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenprune.core.grids import Grid
from tokenprune.errors import InputError, UnsupportedModelError

Order = Literal["raster", "units"]
"""How the patches of a picture follow each other: row by row, or the patches of one vision token behind each other."""

PROVED = frozenset(
    {
        *("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "paddleocr_vl", "kimi_k25"),
        *("internvl", "gemma3", "gemma4", "paligemma", "aya_vision", "cohere2_vision", "idefics3", "smolvlm"),
        *("mistral3", "lighton_ocr", "glm4v", "glm46v", "glm4v_moe", "glm_ocr"),
        *("deepseek_vl", "deepseek_vl_hybrid", "janus", "ovis2", "lfm2_vl"),
    }
)
"""Families whose order of patches tests hold against eager attention: a wrong order would be wrong in silence."""

PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("qkv",), ("in_proj_qkv",))
"""Names under which attention modules hold the projections of queries and keys, apart or fused."""

_ALONG = (
    "spatial_merge_size",
    "merge_kernel_size",
    "downsample_factor",
    "scale_factor",
    "hidden_stride",
    "pooling_kernel_size",
)
"""What configurations call the number of patches along a side of a vision token."""

_SPECIAL = ("class_embedding", "cls_token", "distillation_token", "register_tokens")
"""Parameters of an embedding module that stand in front of the patches."""


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision transformer: tokens in front of the patches, blocks, and patches that become vision tokens."""

    module: nn.Module
    """Its forward is one run over a batch of pictures."""
    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    """Of each block the module that projects queries and keys."""
    prefix: int
    """Tokens of each picture in front of its patches: the class token, registers."""
    class_token: bool
    """Whether the first of them is a class token."""
    last: int
    """The last block whose output the projector reads."""
    side: int = 1
    """Patches along a side of a vision token."""
    order: Order = "raster"

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def block(self, at: int | Fraction | None, asker: str) -> int:
        """The 0-based block that `at` means; `last` for None.

        Raises:
            UnsupportedModelError: the tower has no such block. `asker` opens the message.
        """
        if at is None:
            return self.last
        if isinstance(at, Fraction):
            return min(self.depth - 1, int(at * self.depth + Fraction(1, 2)))
        if not -self.depth <= at < self.depth:
            raise UnsupportedModelError(
                f"{asker}: block {at}, but {type(self.module).__name__} has {self.depth} blocks; "
                f"expected 0 … {self.depth - 1}, or -{self.depth} … -1 from the end"
            )
        return at % self.depth

    def to_tokens(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Rows of vision tokens ``[N, ...]`` as the mean of their patches ``[n, ...]``, picture behind picture.

        Args:
            patches: without what stands in front of them, in the order of the tower.
            grids: (T, H, W) of each picture, in vision tokens.

        Raises:
            InputError: there are not so many patches.
        """
        area = self.side**2
        expected = area * sum(math.prod(grid) for grid in grids)
        if patches.shape[0] != expected:
            raise InputError(
                f"signals of the vision tower: {patches.shape[0]} patches came out of {type(self.module).__name__}, "
                f"but the pictures {list(grids)} of the prompt have {expected}"
            )
        if area == 1:
            return patches
        return _mean(patches[self.units(grids).to(patches.device)], (1,))

    def units(self, grids: Sequence[Grid]) -> Tensor:
        """``[N, side²]`` int64: the patches of each vision token, by their place among all patches."""
        area = self.side**2
        total = area * sum(math.prod(grid) for grid in grids)
        if self.order == "units" or area == 1:
            return torch.arange(total).unflatten(0, (-1, area))
        rows, at = [], 0
        for frames, height, width in grids:
            size = area * frames * height * width
            cut = torch.arange(at, at + size).view(frames, height, self.side, width, self.side)
            rows.append(cut.transpose(2, 3).reshape(-1, area))
            at += size
        return torch.cat(rows)


def find_tower(
    module: nn.Module, *, last: int | None = None, side: int = 1, order: Order = "raster", asker: str = "attach"
) -> Tower:
    """The tower that `module` is: its longest list of blocks with queries and keys, and what stands before patches.

    Args:
        module: a vision transformer of transformers, or one built alike.
        last: as in `Tower`; the last block when left out.
        side: as in `Tower`.
        order: as in `Tower`.
        asker: what needs it; opens the error message.

    Raises:
        UnsupportedModelError: it has no blocks with projections of queries and keys.
    """
    found: list[tuple[list[nn.Module], list[nn.Module]]] = []
    for each in module.modules():
        if isinstance(each, nn.ModuleList):
            attentions = [attention for block in each if (attention := attention_of(block)) is not None]
            if attentions and len(attentions) == len(each):
                found.append((list(each), attentions))
    if not found:
        names = ", ".join("+".join(names) for names in PROJECTIONS)
        raise UnsupportedModelError(
            f"{asker}: {type(module).__name__} has no list of blocks whose attention projects queries and keys "
            f"(looked for {names})"
        )
    blocks, attentions = max(found, key=lambda pair: len(pair[0]))
    special = _special(module)
    prefix = sum(1 if parameter.dim() < 3 else parameter.shape[-2] for _, parameter in special)
    class_token = any(name in ("class_embedding", "cls_token") for name, _ in special)
    depth = len(blocks)
    return Tower(
        module=module,
        blocks=blocks,
        attentions=attentions,
        prefix=prefix,
        class_token=class_token,
        last=depth - 1 if last is None else last,
        side=side,
        order=order,
    )


def attention_of(block: nn.Module) -> nn.Module | None:
    """The first module within `block` that holds projections of queries and keys; None if there is none."""
    for each in block.modules():
        if projections_of(each) is not None:
            return each
    return None


def projections_of(attention: nn.Module) -> tuple[str, ...] | None:
    """The names in `PROJECTIONS` under which this very module holds its projections; None if it holds none."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(attention, name, None), nn.Module) for name in names):
            return names
    return None


def last_read(config: Any, depth: int) -> int:
    """The last block whose output the projector reads, from `vision_feature_layer`: an index into the hidden states,
    of which the first is what enters block 0, or several."""
    layers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if layers is None:
        return depth - 1
    each = [layers] if isinstance(layers, int) else list(layers)
    return max(0, max(at if at >= 0 else depth + 1 + at for at in each) - 1)


def patches_along(config: Any) -> int:
    """Patches along a side of a vision token, as the configuration calls it."""
    vision = getattr(config, "vision_config", None)
    for part, name in itertools.product((config, vision), _ALONG):
        if merge := getattr(part, name, None):
            return int(merge if isinstance(merge, int | float) else merge[0])
    if ratio := getattr(config, "downsample_ratio", None):
        return round(1 / ratio)
    if tokens := getattr(config, "mm_tokens_per_image", None):  # however many patches there are
        assert vision is not None
        return int(vision.image_size // vision.patch_size) // math.isqrt(tokens)
    return 1


def no_patches(title: str) -> UnsupportedModelError:
    """The refusal of a family whose vision tokens are learned queries."""
    return UnsupportedModelError(
        f"attach: what happens inside the vision tower of {title} belongs to no vision token: each is a learned query, "
        "which reads all patches"
    )


def _special(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [(name.rpartition(".")[2], parameter) for name, parameter in module.named_parameters()]
    return [(name, parameter) for name, parameter in named if name in _SPECIAL]


def _mean(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean in float32, back in the dtype of `x`."""
    return x.float().mean(over).to(x.dtype)
