"""Position ids that the decoder reads in place of those it is given: the controls of the experiment on position bias.

FEATHER (section 3) blames distance under the rotary embedding for the choice of the bottom rows. What tokens are, their
order and who may attend to whom stay as they are; only the ids, and with them the rotations, change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenprune.scenes.world.vocabulary import GRID, VISION_TOKENS

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import LlavaForConditionalGeneration

Tensors = tuple[Tensor, ...]

POSITIONS = ("raster", "reversed", "equal", "none")
"""The usual ids; rows of the picture numbered from the bottom; one id for all vision tokens; no rotation at all."""


def position_table(positions: str, length: int) -> Tensor:
    """The id `[length]` that stands for each given one; BOS has id 0, and vision tokens follow it.

    Raises:
        ValueError: `positions` is none of `POSITIONS`.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {positions!r}")
    table = torch.arange(length)
    vision = table[1 : VISION_TOKENS + 1]
    if positions == "reversed":
        vision.copy_(vision.view(GRID, GRID).flip(0).flatten())
    elif positions == "equal":
        vision.fill_(VISION_TOKENS)
    elif positions == "none":
        table.zero_()
    return table


def read_positions(model: LlavaForConditionalGeneration, table: Tensor) -> RemovableHandle:
    """Let the rotary embedding of `model` read `table[id]` for every position id, until the handle is removed."""
    table = table.to(model.device)

    def replace(_: nn.Module, args: Tensors, kwargs: dict[str, Tensor]) -> tuple[Tensors, dict[str, Tensor]]:
        return args, {**kwargs, "position_ids": table[kwargs["position_ids"]]}

    rotary: nn.Module = model.model.language_model.rotary_emb
    return rotary.register_forward_pre_hook(replace, with_kwargs=True)
