"""What a report says in words."""

from __future__ import annotations

import torch

from tokenprune.core.clock import Stopwatch
from tokenprune.core.report import Report
from tokenprune.core.stage_report import StageReport


def test_merged_tokens_are_told_apart_from_kept_ones() -> None:
    """The first token of a picture may stand for merged ones, too."""
    report = Report("drawn", "0", 4, 1)
    report.begin((9, 9), (((1, 3, 3),),) * 2)
    left = torch.tensor([[0, 2, 5], [1, 3, 4]])
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    report.finish(
        [
            StageReport(
                "s", "before layer 1", 1, left, torch.tensor([[0], [-1]]), (3, 3), None, nothing, Stopwatch(False)
            )
        ]
    )
    first, second = [line.strip() for line in str(report).splitlines() if line.startswith("  before")]
    assert first.endswith("(layer 1): 2 kept + 1 merged")
    assert second.endswith("(layer 1): 3 kept")
