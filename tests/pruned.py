"""What the engine tests share: running a model with a recipe on, and by the masked reference of what the recipe did."""

from __future__ import annotations

from tokenprune.testing.runs import TOLERANCE as TOLERANCE
from tokenprune.testing.runs import logits_of as logits_of
from tokenprune.testing.runs import reference_stages as reference_stages
from tokenprune.testing.runs import run_both as run_both
from tokenprune.testing.runs import snapshot as snapshot
from tokenprune.testing.runs import stage_results as stage_results
from tokenprune.testing.runs import worst as worst
