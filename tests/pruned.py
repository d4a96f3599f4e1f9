"""What the engine tests share: running a model with a recipe on, and by the masked reference of what the recipe did."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune.engine.traces import pre_hook
from tokenprune.testing.runs import TOLERANCE as TOLERANCE
from tokenprune.testing.runs import logits_of as logits_of
from tokenprune.testing.runs import reference_stages as reference_stages
from tokenprune.testing.runs import run_both as run_both
from tokenprune.testing.runs import snapshot as snapshot
from tokenprune.testing.runs import stage_results as stage_results
from tokenprune.testing.runs import worst as worst


def entering(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, L, D]`` that enter the decoder, and hidden states ``[B, m, D]`` that enter its first layer."""
    seen: list[Tensor] = []
    hooks = [
        pre_hook(model.get_decoder(), lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"])),
        pre_hook(model.get_decoder().layers[0], lambda module, args, kwargs: seen.append(args[0])),
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]
