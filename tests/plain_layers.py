"""More papers in plain Python (see plain.py): methods before a decoder layer, repair, and video. One sample, loops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from plain import Array, best, softmax

Merged = dict[int, Array]
"""Survivor to its new state."""


def cosine(a: Array, b: Array) -> float:
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)


def change(before: Array, now: Array) -> list[float]:
    """V2Drop: the length of what the layer has added to each token."""
    return [float(np.linalg.norm(b - a)) for a, b in zip(before, now, strict=True)]


def information(task: Array, prior: Array) -> list[float]:
    """PriorTR: P log(P / Q), from the attention that rater and prior token pay to the vision tokens."""
    p, q = task / task.sum(), prior / prior.sum()
    return [float(a * (np.log(a + 1e-10) - np.log(b + 1e-10))) for a, b in zip(p, q, strict=True)]


def received(askers: Array, vision: Array) -> list[float]:
    """STAR, mended: mean over askers of their softmax over vision tokens of scaled dot products."""
    votes = [softmax(vision @ asker / vision.shape[1] ** 0.5) for asker in askers]
    return [float(np.mean([vote[j] for vote in votes])) for j in range(len(vision))]


def global_query(queries: Array, keys: Array, hidden: Array) -> list[float]:
    """PACT: softmax of keys ``[N, Hkv, d]`` times the mean of queries ``[N, H, d]``, mean over heads, times ‖h‖."""
    heads, shared = queries.shape[1], queries.shape[1] // keys.shape[1]
    asked = queries.mean(0)
    answers = np.mean([softmax(keys[:, h // shared] @ asked[h] / keys.shape[2] ** 0.5) for h in range(heads)], axis=0)
    return [float(a * np.linalg.norm(x)) for a, x in zip(answers, hidden, strict=True)]


def upper_energy(x: Array, high: float) -> float:
    """Share of a row's energy in the upper frequencies, by the definition of the Fourier transform."""
    n = len(x)
    energy = [abs(sum(x[t] * np.exp(-2j * np.pi * f * t / n) for t in range(n))) ** 2 for f in range(1, n // 2 + 1)]
    upper = energy[len(energy) - max(1, int(high * len(energy))) :]
    return float(sum(upper) / sum(energy)) if sum(energy) > 0 else 0.0


def spectral_change(first: Array, now: Array, attention: Array, high: float = 0.5) -> list[float]:
    """CLSE as we read it: what has left the upper frequencies, times the attention."""
    moved = [max(0.0, upper_energy(a, high) - upper_energy(b, high)) for a, b in zip(first, now, strict=True)]
    return [m * float(a) for m, a in zip(moved, attention, strict=True)]


def temporal_change(hidden: Array, frames: int, run: int | None = None) -> list[float | None]:
    """EVS and DyCoke: 1 - cosine with the same place in the frame compared with; None where there is none."""
    each = len(hidden) // frames
    found: list[float | None] = []
    for i in range(len(hidden)):
        frame = i // each
        if run is None:
            back = 1 if frame else 0
        else:  # DyCoke: of four frames 1 with 0, 3 with 2, 2 with 0
            back = {0: 0, 1: 1, 2: 2, 3: 1}[frame % run]
        found.append(1 - cosine(hidden[i], hidden[i - back * each]) if back else None)
    return found


def vidcom2(hidden: Array, frames: int) -> list[float]:
    """VidCom²: minus Gaussian similarity to video mean and frame mean, on the half of channels that vary least."""
    x = np.array([row / np.linalg.norm(row) for row in hidden])
    spread = [float(np.mean((x[:, c] - x[:, c].mean()) ** 2)) for c in range(x.shape[1])]
    x = x[:, sorted(sorted(range(x.shape[1]), key=lambda c: (spread[c], c))[: x.shape[1] // 2])]
    each = len(x) // frames
    out = []
    for i, row in enumerate(x):
        frame = x[i // each * each : (i // each + 1) * each].mean(0)
        alike = 0.0
        for centre in (frame, x.mean(0)):
            alike += sum(np.exp(-np.sum((row - centre) ** 2) / (2 * 2.0**k)) for k in range(-3, 2))
        out.append(-float(alike))
    return out


def vidcom2_budget(scores: Sequence[float], frames: int, temperature: float) -> list[float]:
    """What each frame is due: 1 + p - mean p, p the softmax of the frames' mean scores."""
    each = len(scores) // frames
    p = softmax(np.array([np.mean(scores[f * each : (f + 1) * each]) for f in range(frames)]) / temperature)
    return [float(1 + each_p - p.mean()) for each_p in p]


def vcast(hidden: Array, frames: int) -> list[float]:
    """V-CAST: 1 - cosine with the frame mean, plus the length scaled to 0 … 1 over the video."""
    each = len(hidden) // frames
    lengths = [float(np.linalg.norm(row)) for row in hidden]
    low, high = min(lengths), max(lengths)
    means = [hidden[f * each : (f + 1) * each].mean(0) for f in range(frames)]
    return [1 - cosine(row, means[i // each]) + (lengths[i] - low) / (high - low) for i, row in enumerate(hidden)]


def vcast_budget(hidden: Array, frames: int, temperature: float) -> list[float]:
    """What each frame is due: the softmax of the curvature of the path of frame means, 1 at both ends."""
    each = len(hidden) // frames
    m = [hidden[f * each : (f + 1) * each].mean(0) for f in range(frames)]
    bent = [1.0] * frames
    for t in range(1, frames - 1):
        bent[t] = 1 - cosine(m[t] - m[t - 1], m[t + 1] - m[t])
    return [float(p) for p in softmax(np.array(bent) / temperature)]


def shares(count: int, sizes: Sequence[int], due: Sequence[float]) -> list[int]:
    """Largest remainder with caps: one step at a time, whoever is over its size is filled and leaves."""
    out, left, open_ = [0] * len(sizes), count, [i for i, size in enumerate(sizes) if size]
    while True:
        total = sum(due[i] for i in open_)
        full = [i for i in open_ if due[i] * left / total >= sizes[i] - 1e-9] if total else []
        if not full:
            break
        for i in full:
            out[i], left = sizes[i], left - sizes[i]
            open_.remove(i)
    quota = {i: due[i] * left / sum(due[j] for j in open_) for i in open_}
    for i in open_:
        out[i] = int(quota[i] + 1e-9)
    for i in sorted(open_, key=lambda i: (-(quota[i] - out[i]), i))[: count - sum(out)]:
        out[i] += 1
    return out


def scenes(hidden: Array, frames: int, cuts: int, below: float) -> list[int]:
    """FastVID: the scene of each frame; cuts at the lowest cosines of neighbouring frame means, and below a bound."""
    each = len(hidden) // frames
    means = [hidden[f * each : (f + 1) * each].mean(0) for f in range(frames)]
    alike = [cosine(a, b) for a, b in pairwise(means)]
    lowest = sorted(range(len(alike)), key=lambda i: alike[i])[:cuts]
    at = {i + 1 for i in lowest} | {i + 1 for i, value in enumerate(alike) if value < below}
    scene, out = 0, []
    for f in range(frames):
        scene += f in at
        out.append(scene)
    return out


def dart(keys: Array, hidden: Array, text_keys: Array, text: Array, count: int, vision: int, words: int) -> list[int]:
    """DART: pivots by the length of keys; each takes the q least similar of what is left, the last what is missing."""
    pivots = sorted(range(len(keys)), key=lambda i: -np.abs(keys[i]).sum())[:vision]
    spoken = sorted(range(len(text_keys)), key=lambda i: -np.abs(text_keys[i]).sum())[:words]
    kept = pivots[:count]
    features = [hidden[i] for i in pivots] + [text[i] for i in spoken]
    features += [hidden[pivots[j % len(pivots)]] for j in range(len(spoken), words)]
    q = -(-(count - len(kept)) // len(features))
    for pivot in features:
        left = [i for i in range(len(hidden)) if i not in kept]
        takes = min(q, count - len(kept))
        kept = kept + sorted(left, key=lambda i: cosine(hidden[i], pivot))[:takes]
    return sorted(kept)


def max_sum(hidden: Array, count: int) -> list[int]:
    """ToDRE: each next token has the largest sum of distances to those chosen; the first, to all. Picks in order."""
    kept: list[int] = []
    while len(kept) < count:
        to = kept or range(len(hidden))
        far = {i: sum(1 - cosine(hidden[i], hidden[j]) for j in to) for i in range(len(hidden)) if i not in kept}
        kept.append(max(far, key=lambda i: (round(far[i], 9), -i)))
    return kept


def nearest(
    hidden: Array, kept: Sequence[int], average: str, mass: Sequence[float], may: Sequence[Sequence[bool]], own: float
) -> Merged:
    """Every dropped token joins the survivor that it is most like, out of those that it may join."""
    joined: dict[int, list[int]] = {k: [] for k in kept}
    for i in range(len(hidden)):
        choice = [k for k in kept if may[i][k]]
        if i not in joined and choice:
            joined[max(choice, key=lambda k: (cosine(hidden[i], hidden[k]), -k))].append(i)
    out: Merged = {}
    for k, others in joined.items():
        members = [k, *others]
        if average == "blend":
            w = max(1 / len(members), own) if others else 1.0
            mean = hidden[others].mean(0) if others else 0.0
            out[k] = w * hidden[k] + (1 - w) * mean
        else:
            weights = np.array([mass[i] if average == "mass" else 1.0 for i in members])
            out[k] = (hidden[members] * weights[:, None]).sum(0) / weights.sum()
    return out


def above_reference(scores: Sequence[float], hidden: Array, registers: int, factor: float) -> int:
    """OccamToken as we read it: how many score above the mean score of the tokens with the longest states."""
    longest = best([float(np.linalg.norm(x)) for x in hidden], registers)
    reference = factor * float(np.mean([scores[i] for i in longest]))
    return max(1, sum(score > reference for score in scores))
