"""Many questions, answered with fewer vision tokens: in batches, by one process or several, into a file that survives
kills."""

from __future__ import annotations

from tokenprune.study.many.answerer import Answerer, Done, Measured
from tokenprune.study.many.answers_file import AnswersFile
from tokenprune.study.many.batches import Line, in_batches
from tokenprune.study.many.pool import Alone, Pool

__all__ = ["Alone", "Answerer", "AnswersFile", "Done", "Line", "Measured", "Pool", "in_batches"]
