"""Linear layers whose weights oneDNN has laid out beforehand, as inference libraries for CPUs do.

PyTorch's own float32 products lay the weights out anew in every call. That costs the same for 80 rows as for 640, so
short prompts pay more for it; with it done beforehand every side is faster, the untouched model included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PACKED: list[Tensor] = []
"""Weights in oneDNN's own layout. They have no storage that PyTorch could read, so torch.compile cannot trace them: a
graph holds the number of one."""

LIBRARY = torch.library.Library("tokenprune_benchmarks", "DEF")
LIBRARY.define("linear(Tensor x, int number, int width, Tensor? bias) -> Tensor")


def linear(x: Tensor, number: int, width: int, bias: Tensor | None) -> Tensor:
    """The operator that torch.compile itself takes for frozen weights."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, PACKED[number], bias, "none", [], "")
    return out


LIBRARY.impl("linear", linear, "CPU")


@torch.library.register_fake("tokenprune_benchmarks::linear")
def _(x: Tensor, number: int, width: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


class Prepacked(nn.Module):
    """A linear layer in inference, of the packed weight of this number."""

    def __init__(self, number: int, width: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.number = number
        self.width = width
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling()  # else the way through the operator only costs time
        product = torch.ops.tokenprune_benchmarks.linear if traced else linear
        out: Tensor = product(x, self.number, self.width, self.bias)
        return out


def prepack(model: nn.Module) -> None:
    """Replace every linear layer of `model`, whose weights then take memory twice while the old ones live."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                PACKED.append(torch.ops.mkldnn._reorder_linear_weight(child.weight.detach(), None))
                setattr(module, name, Prepacked(len(PACKED) - 1, child.out_features, child.bias))
