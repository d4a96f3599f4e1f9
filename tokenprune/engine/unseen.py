"""Forwards in which nothing tells where vision tokens stand: said by the caller, or warned of once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.report import Report
from tokenprune.errors import InputError, UnprunedWarning


class Unseen:
    """Tells of forwards that ran untouched because nobody could see their pictures: in `report`, and by one warning.

    Args:
        report: that would otherwise go on to tell of an earlier forward.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self._warned = False

    def embeddings(self) -> None:
        """The language model has been called with embeddings alone."""
        self._tell(
            "the language model was called with embeddings and no input_ids, and nothing tells which of them are "
            "vision tokens; give input_ids, or say it by `with attached.vision_at(mask):` (all False for text)"
        )

    def layers(self, hidden: Any) -> None:
        """The first decoder layer has been called with `hidden` ``[B, L, D]``, but not by the language model."""
        single = isinstance(hidden, Tensor) and hidden.shape[-2] == 1
        # Checkpointed layers run once more in the backward pass.
        if not single and torch._C._current_graph_task_id() == -1:
            self._tell(
                "decoder layers ran outside of a call of the language model (was its `forward` called directly?), so "
                "nothing tells which tokens are vision tokens; call the module itself"
            )

    def _tell(self, reason: str) -> None:
        self.report.forget(reason)
        if not self._warned:
            self._warned = True
            message = f"recipe {self.report.recipe!r} did not run: {reason}. This is said once"
            warnings.warn(message, UnprunedWarning, stacklevel=2)


def stated(mask: Tensor, embeddings: Tensor) -> Tensor:
    """``[B, L]`` bool, the caller's own `mask` for these `embeddings` ``[B, L, D]``; beams repeat its rows.

    Raises:
        InputError: it is not of their shape.
    """
    batch, length = embeddings.shape[:2]
    if mask.dim() != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise InputError(
            f"vision_at: a mask of shape {tuple(mask.shape)}, but embeddings of shape {tuple(embeddings.shape)} came; "
            f"expected {(batch, length)}"
        )
    return mask.to(embeddings.device, torch.bool).repeat_interleave(batch // mask.shape[0], 0)
