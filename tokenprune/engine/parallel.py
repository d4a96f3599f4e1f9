"""Tensor parallelism: every process of a model holds some of its heads, and all must keep the same tokens.

A process that ranked tokens by its own heads would keep others than its neighbours, and the sums that the layers take
over the processes would add up different tokens, in silence. So the attention of raters is gathered over all heads, in
their order, before any part sees it; hidden states are the same everywhere already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError

Gather = Callable[[Tensor], Tensor]
"""From ``[B, h, ...]`` of this process's heads to ``[B, R · h, ...]`` of all R processes, in the order of the heads."""


def check_parallel(layers: Sequence[nn.Module], config: Any, *, compiled: bool) -> None:
    """Raise `UnsupportedModelError` for a model in parallel that no recipe can be right on.

    Args:
        layers: of the decoder.
        config: of the decoder.
        compiled: whether the recipe is to run in one graph with the model.
    """
    mesh = next((found for layer in layers if (found := mesh_of(layer)) is not None), None)
    if mesh is None:
        return
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or config.num_attention_heads
        if heads % mesh.size():
            raise UnsupportedModelError(
                f"attach: {mesh.size()} processes share {heads} heads ({name}) unevenly, so no process has whole ones; "
                "load the model with a tp_size that divides them"
            )
    if compiled:
        raise UnsupportedModelError(
            f"attach(compile=True): the model is spread over {mesh.size()} processes (tensor parallel), which is not "
            "supported in one graph; leave compile out"
        )


def gather_of(layer: Any, heads: int) -> Gather | None:
    """How the attention of all heads comes together, where a process computes `heads` of those of `layer`.

    None where it has all of them: the model is whole, or its projections are gathered.
    """
    mesh = mesh_of(layer)
    if mesh is None or heads == layer.self_attn.config.num_attention_heads:
        return None
    group = mesh.get_group()

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(mesh.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    return gather


def mesh_of(layer: Any) -> Any | None:
    """The processes, a `DeviceMesh` of one dimension, that share the heads of `layer`; None where this one has all."""
    projection = getattr(getattr(layer, "self_attn", None), "q_proj", None)
    mesh = getattr(getattr(projection, "weight", None), "device_mesh", None)  # of a `DTensor`
    if mesh is None:
        return None
    if mesh.ndim > 1:
        names = mesh.mesh_dim_names or ()
        mesh = mesh["tp"] if "tp" in names else None
    elif mesh.mesh_dim_names not in (None, ("tp",)):
        return None  # sharded for something else: whole where it runs
    return mesh if mesh is not None and mesh.size() > 1 else None
