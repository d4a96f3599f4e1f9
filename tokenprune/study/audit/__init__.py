"""Where in the picture a recipe keeps its tokens: the position bias of each stage, over many prefills.

Feed an `Audit` with the reports of an attached recipe, then read `Audit.stages`. It needs nothing but reports, so it
works on any supported model. Measures are those of FEATHER (arXiv:2412.13180, section 3): a heat map of how often each
place is kept, the mean height of what is kept, and a chi-square statistic of the rows. Of that only the effect size is
given, no p-value: tokens of one picture are not independent, and with many pictures any p is small.
"""

from __future__ import annotations

from tokenprune.study.audit.collect import Audit
from tokenprune.study.audit.stages import THIRDS, Axis, Recall, StageAudit
from tokenprune.study.audit.survey import Survey, audit, audit_cases
from tokenprune.study.cases import Box
from tokenprune.study.statistics import Estimate, proportion, rank_correlation

__all__ = [
    "THIRDS",
    "Audit",
    "Axis",
    "Box",
    "Estimate",
    "Recall",
    "StageAudit",
    "Survey",
    "audit",
    "audit_cases",
    "proportion",
    "rank_correlation",
]
