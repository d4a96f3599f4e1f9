"""The reference for ``positions: renumber``: in the unpruned model, layers see the places that survivors have alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def numbered_through(model: Any, vision: Tensor, mask: Tensor, stages: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """In the unpruned model, let each layer see the positions that its survivors would have if they stood alone."""
    text, seen = model.get_decoder(), {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["position_ids"]
        seen["ids"] = ids[1:] if ids.dim() == 3 and len(ids) == 4 else ids

    def counted(kept: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        survives = mask.bool() & ~vision
        for row, own in enumerate(vision):
            survives[row, own.nonzero().flatten()[kept[row][kept[row] >= 0]]] = True
        repeat = rows // len(vision)
        return survives.repeat_interleave(repeat, 0), mask.bool().repeat_interleave(repeat, 0)

    def renumber(kept: Tensor) -> Any:
        state: dict[str, Tensor] = {}

        def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden, ids = args[0], seen["ids"]
            survives, real = counted(kept, len(hidden))
            if hidden.shape[1] > 1:
                highest = ids.expand(*ids.shape[:-2], len(hidden), -1).masked_fill(~real, -1)
                highest = highest.amax(-1) if ids.dim() == 2 else highest.amax(0).amax(-1)
                state["shift"] = highest + 1 - survives.sum(1)
                new = (survives.cumsum(1) - 1).clamp(min=0)
                new = new if ids.dim() == 2 else new.expand(3, -1, -1)
            else:
                new = ids - state["shift"][:, None]
            return args, kwargs | {"position_embeddings": text.rotary_emb(hidden, new)}

        return hook

    handles = [text.register_forward_pre_hook(note, with_kwargs=True)]
    for index, layer in enumerate(text.layers):
        reached = [kept for at, kept in stages if at <= index]
        if reached:
            handles.append(layer.register_forward_pre_hook(renumber(reached[-1]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
