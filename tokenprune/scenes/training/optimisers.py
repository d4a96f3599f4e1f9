"""How the embedded model learns: the optimisers of a phase and their learning rate."""

from __future__ import annotations

from typing import Any

import torch

from tokenprune.scenes.training.muon import Muon
from tokenprune.scenes.training.phases import ParameterGroup, Phase

WARM_UP = 20
"""Steps over which the learning rate rises at the start of a phase."""


class Optimisers:
    """The optimisers of one phase: Muon for hidden matrices, AdamW for the rest, at one scheduled learning rate."""

    def __init__(self, phase: Phase, groups: list[ParameterGroup]) -> None:
        self.phase = phase
        matrices = [{"params": group.matrices, "share": group.share} for group in groups]
        rest = [{"params": group.rest, "share": group.share} for group in groups]
        self.muon = Muon(matrices, lr=phase.rate)
        self.adam = torch.optim.AdamW(rest, lr=phase.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.parameters = [p for group in groups for p in (*group.matrices, *group.rest)]

    def rate(self, step: int, steps: int) -> float:
        """Warm-up, constant, then linear to `final`."""
        decay = min(1.0, (steps - step) / max(1.0, (1 - self.phase.hold) * steps))
        share = self.phase.final + (1 - self.phase.final) * decay
        return self.phase.rate * share * min(1.0, (step + 1) / WARM_UP)

    def step(self, step: int, steps: int) -> float:
        """Update all parameters with their clipped gradients as step number `step`; returns the learning rate."""
        rate = self.rate(step, steps)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in (self.muon, self.adam):
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
