"""Two counters that watch a model run, fvcore's and PyTorch's: multiply-adds by module, to hold the ledger against.

Each is told the little that it leaves out and that does not go through a matrix product. What neither needs to be told
is attention, as long as the model runs it in matrix products (``attn_implementation="eager"``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokenprune.errors import InputError

if TYPE_CHECKING:
    from fvcore.nn import FlopCountAnalysis


def torch_counts(model: nn.Module, inputs: Mapping[str, Any], *, fused: bool = True) -> dict[str, int]:
    """Multiply-adds of one forward by the name of the module, as PyTorch's `FlopCounterMode` sees them; ``""`` is all.

    What runs in a hook of a module counts as the module's.

    Args:
        model: run without gradients, for the logits of the last token alone.
        inputs: keyword arguments of its forward.
        fused: count the fused attention of CPUs, too, for which PyTorch counts 0 (pytorch/pytorch#195460).
    """
    told = {**_FOR_TORCH, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa} if fused else _FOR_TORCH
    with FlopCounterMode(display=False, custom_mapping=told) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    counts = {"": int(counter.get_total_flops()) // 2}
    for name, operations in counter.get_flop_counts().items():
        if "." in name:  # the first part names the model's class
            counts[name.partition(".")[2]] = sum(operations.values()) // 2
    return counts


def fvcore_counts(module: Any, inputs: Mapping[str, Tensor], **fixed: Any) -> dict[str, int]:
    """Multiply-adds of one forward by the name of the module, as fvcore sees them in a trace; ``""`` is all.

    What runs in a hook of a module counts as its parent's. Only what the result depends on is in a trace.

    Args:
        module: run without gradients.
        inputs: tensors among the keyword arguments of its forward.
        fixed: its other arguments.

    Raises:
        InputError: fvcore is not installed.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # fvcore uses what PyTorch has marked as old
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError:
            raise InputError("fvcore is not installed, which counts here; pip install 'tokenprune[verify]'") from None
        analysis: FlopCountAnalysis = FlopCountAnalysis(Traceable(module, list(inputs), fixed), tuple(inputs.values()))
        # A layer's projections that a stage calls by itself belong to the stage.
        analysis.ancestor_mode("caller")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_in_a_graph)
        analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)  # norms are no matrix products
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = analysis.by_module()
    return {name.removeprefix("module").removeprefix("."): int(count) for name, count in counts.items()}


class Traceable(nn.Module):
    """A module that takes tensors in order, which is what PyTorch traces; other arguments are fixed."""

    def __init__(self, module: Any, names: list[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.fixed = fixed

    def forward(self, *tensors: Tensor) -> Tensor:
        out = self.module(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        return out.logits if hasattr(out, "logits") else out


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cdist(x: Any, y: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * y[1] * x[2]


def _eigenvalues(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Reduction to tridiagonal form, 4/3 n³ operations; what comes after it, and is left out, goes with n²."""
    return int(2 * (2 * x[-1] ** 3 // 3))


_FOR_TORCH = {torch.ops.aten._linalg_eigh: _eigenvalues, torch.ops.aten._cdist_forward: _cdist}
"""Operations that PyTorch counts as 0: two operations a multiply-add."""


def _sdpa_in_a_graph(inputs: list[Any], outputs: list[Any]) -> int:
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return int(q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))
