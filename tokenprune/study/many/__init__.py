"""Many questions, answered with fewer vision tokens: in batches, into a file that survives kills."""

from __future__ import annotations

from tokenprune.study.many.answerer import Answerer, Done, Measured
from tokenprune.study.many.answers_file import AnswersFile
from tokenprune.study.many.batches import Batch, Line, digest, in_batches

__all__ = ["Answerer", "AnswersFile", "Batch", "Done", "Line", "Measured", "digest", "in_batches"]
