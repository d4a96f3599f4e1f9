"""References for the golden lines of methods before a layer, of repair and of video: see methods.py."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import plain
import plain_greedy
import plain_layers
import plain_tower
import plain_transport

if TYPE_CHECKING:
    from parts.methods import Seen


def dart(seen: Seen, keep: int) -> list[int]:
    keys, spoken = (x.reshape(len(x), -1) for x in (seen.signals["layer_keys"], seen.text_keys))
    return plain_layers.dart(keys, seen.hidden, spoken, seen.states, keep, 4, 4)


def priortr(seen: Seen, keep: int) -> list[int]:
    attention = plain.eager_attention(seen.q, seen.k)
    task, prior = (plain.attention_scores(attention, [row], seen.vision) for row in (seen.last, len(seen.hidden)))
    return plain.best(plain_layers.information(task, prior), keep)


def greedyprune(seen: Seen, keep: int) -> list[int]:
    scores = [plain_greedy.cosine(x, seen.states[-1]) for x in seen.hidden]
    return sorted(plain_greedy.suppress(scores, plain_greedy.cosines(seen.hidden, seen.hidden), 0.9, keep))


def v2drop(seen: Seen, keep: int) -> list[int]:
    return plain.best(plain_layers.change(seen.signals["earlier_1"], seen.hidden), keep)


def max_sum(seen: Seen, keep: int) -> list[int]:
    return sorted(plain_layers.max_sum(seen.hidden, keep))


def star(seen: Seen, keep: int) -> list[int]:
    return plain.best(plain_layers.received(seen.hidden, seen.hidden), keep)


def topv(seen: Seen, keep: int) -> list[int]:
    scores = plain_transport.transport(seen.signals["earlier_1"], seen.hidden, [(1, *seen.grid)])
    return plain_tower.best_and_even(np.array(scores), keep, Fraction(66667, 100000))


def pact(seen: Seen, keep: int) -> list[int]:
    scores = plain_layers.global_query(seen.signals["layer_queries"], seen.signals["layer_keys"], seen.hidden)
    return plain.best(scores, keep)


def restore(seen: Seen, keep: int) -> list[int]:
    return plain.best(plain.prominences(seen.hidden, 5), keep)


def new_in_frame(seen: Seen, keep: int) -> list[int]:
    """EVS: the first frame, and what has changed most; enough for the first frame."""
    scores = plain_layers.temporal_change(seen.hidden, seen.frames)
    return plain.best([9.0 if score is None else score for score in scores], keep)


def by_frame(seen: Seen, scores: list[float], counts: list[int]) -> list[int]:
    """The best of each frame, as many as it is given."""
    each = len(seen.hidden) // seen.frames
    return [
        frame * each + i
        for frame, count in enumerate(counts)
        for i in plain.best(scores[frame * each : (frame + 1) * each], count)
    ]


def dycoke(seen: Seen, keep: int) -> list[int]:
    scores = plain_layers.temporal_change(seen.hidden, seen.frames, 4)
    due = [1e6 if frame % 4 == 0 else 1.0 for frame in range(seen.frames)]
    counts = plain_layers.shares(keep, sizes(seen), due)
    return by_frame(seen, [9.0 if score is None else score for score in scores], counts)


def vidcom2(seen: Seen, keep: int) -> list[int]:
    scores = plain_layers.vidcom2(seen.hidden, seen.frames)
    due = plain_layers.vidcom2_budget(scores, seen.frames, 0.01)
    return by_frame(seen, scores, plain_layers.shares(keep, sizes(seen), due))


def vcast(seen: Seen, keep: int) -> list[int]:
    scores = plain_layers.vcast(seen.hidden, seen.frames)
    due = plain_layers.vcast_budget(seen.hidden, seen.frames, 0.7)
    return by_frame(seen, scores, plain_layers.shares(keep, sizes(seen), due))


def fastvid(seen: Seen, keep: int) -> list[int]:
    scene = np.repeat(plain_layers.scenes(seen.hidden, seen.frames, 7, 0.9), len(seen.hidden) // seen.frames)
    own = [[i for i in seen.vision if scene[i] == s] for s in range(max(scene) + 1)]
    counts = plain_layers.shares(keep, [len(group) for group in own], [len(group) for group in own])
    scores = plain.prominences(seen.hidden, 4)
    chosen = [group[i] for group, k in zip(own, counts, strict=True) for i in plain.best([scores[j] for j in group], k)]
    return sorted(chosen)


def sizes(seen: Seen) -> list[int]:
    return [len(seen.hidden) // seen.frames] * seen.frames
