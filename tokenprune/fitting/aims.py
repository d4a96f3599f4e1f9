"""What each aim of a `Plan` minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenprune.families.chat import Chat
from tokenprune.fitting.boxes import BoxesObjective
from tokenprune.fitting.objectives import AttentionObjective, LogitsObjective, Objective
from tokenprune.fitting.plan import Aim, Plan
from tokenprune.stage import Stage

OBJECTIVES: dict[Aim, Callable[[Chat, Sequence[Stage], Plan], Objective]] = {
    "attention": AttentionObjective,
    "logits": LogitsObjective,
    "boxes": BoxesObjective,
}


def objective(chat: Chat, stages: Sequence[Stage], plan: Plan) -> Objective:
    """What the plan's aim minimises."""
    return OBJECTIVES[plan.aim](chat, stages, plan)
