"""Many questions, answered with fewer vision tokens: in batches, by one process, several or a cluster, into a file that
survives kills."""

from __future__ import annotations

from tokenprune.study.many.answerer import Answerer, Done, Measured
from tokenprune.study.many.answers_file import AnswersFile
from tokenprune.study.many.batches import Line, digest, in_batches
from tokenprune.study.many.on_ray import OnRay
from tokenprune.study.many.pool import Alone, Pool

__all__ = ["Alone", "Answerer", "AnswersFile", "Done", "Line", "Measured", "OnRay", "Pool", "digest", "in_batches"]
