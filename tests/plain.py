"""Papers in plain Python: what a stage keeps and merges, from full attention matrices of one sample, with simple loops.

Written apart from the package, from the papers' formulas, in float64 and without batches, padding or cleverness. Tests
hold the fast code against it. Attention is ``[H, L, L]``, numpy; tokens are named by their place in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotate(x: Array, positions: Sequence[int], base: float = 1e4) -> Array:
    """Rotary embedding of ``[..., L, d]``, first half against second half of the width (Llama)."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * base ** (-i / half)
            a, b = x[..., row, i], x[..., row, half + i]
            out[..., row, i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., row, half + i] = b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def eager_attention(q: Array, k: Array, scaling: float | None = None, softcap: float | None = None) -> Array:
    """Causal attention ``[H, L, L]`` from q ``[H, L, d]`` and k ``[Hkv, L, d]``."""
    heads, length, width = q.shape
    scaling = width**-0.5 if scaling is None else scaling
    attention = np.zeros((heads, length, length))
    for h in range(heads):
        keys = k[h * k.shape[0] // heads]
        for i in range(length):
            logits = keys[: i + 1] @ q[h, i] * scaling
            if softcap is not None:
                logits = np.tanh(logits / softcap) * softcap
            attention[h, i, : i + 1] = softmax(logits)
    return attention


def best(scores: Sequence[float] | Array, count: int) -> list[int]:
    """Indices of the highest scores, ascending; of equals the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def above_mean_raters(vision: Array, text: Array) -> list[int]:
    """SparseVLM, equations 4 to 6: text tokens whose share of the vision tokens' votes is at least 1/T."""
    share = np.mean([softmax(text @ v) for v in vision], axis=0)
    return [i for i in range(len(text)) if share[i] >= 1 / len(text) - 1e-6]


def attention_scores(attention: Array, rows: Sequence[int], columns: Sequence[int]) -> Array:
    """Mean over heads and raters of the attention that each vision token gets (FastV, SparseVLM)."""
    return np.array([np.mean([attention[h, i, j] for h in range(len(attention)) for i in rows]) for j in columns])


def fastv(attention: Array, columns: Sequence[int], last: int, keep: int) -> list[int]:
    """Indices (among the vision tokens) that FastV keeps: the attention of the last text token decides."""
    return best(attention_scores(attention, [last], columns), keep)


def feather_scores(q: Array, k: Array, columns: Sequence[int], last: int) -> Array:
    """FEATHER's criterion: q and k before the rotary embedding, softmax over vision keys only, mean over heads."""
    heads, _, width = q.shape
    keys = [k[h * k.shape[0] // heads][list(columns)] for h in range(heads)]
    return np.mean([softmax(keys[h] @ q[h, last] / width**0.5) for h in range(heads)], axis=0)


def feather(scores: Array, keep: int, height: int, width: int, stride: int) -> list[int]:
    """FEATHER's first stage: the best by score, and every `stride`-th row and column."""
    grid = {r * width + c for r in range(0, height, stride) for c in range(0, width, stride)}
    return sorted(grid | set(best(scores, keep)))


def densities(apart: Sequence[Sequence[float]], neighbours: int) -> list[float]:
    """Minus the mean squared distance of the `neighbours` nearest, the token itself included."""
    return [-float(np.mean(np.sort(row)[:neighbours] ** 2)) for row in apart]


def prominences(x: Array, neighbours: int, divide: bool = True) -> list[float]:
    """Log-density plus log-separation of the rows of `x`; density is that of the `neighbours` nearest."""
    n = len(x)
    apart = [[float(np.linalg.norm(a - b)) / (x.shape[1] ** 0.5 if divide else 1) for b in x] for a in x]
    density = densities(apart, neighbours)
    found = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        separation = min(apart[i][j] for j in denser) if denser else max(apart[i])
        found.append(density[i] + np.log(separation) if separation > 0 else -np.inf)
    return found


def density_peaks(x: Array, clusters: int, cosine: bool = False, divide: bool = True) -> dict[int, list[int]]:
    """Centre to members (itself included) of the rows of `x`, clustered by density peaks with k = `clusters`."""
    n = len(x)
    apart = [[float(np.linalg.norm(a - b)) for b in x] for a in x]
    centres = best(prominences(x, clusters, divide), clusters)
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(n):
        if cosine:
            far = {c: -float(x[i] @ x[c]) / float(np.linalg.norm(x[i]) * np.linalg.norm(x[c])) for c in centres}
        else:
            far = {c: apart[i][c] for c in centres}
        members[i if i in members else min(centres, key=lambda c: (far[c], c))].append(i)
    return members


def sparsevlm_stage(
    hidden: Array, scores: Array, keep: int, *, mean: bool = True, cosine: bool = False, divide: bool = True
) -> tuple[list[int], dict[int, Array]]:
    """What SparseVLM v1.5 keeps of the vision tokens, and the merged tokens by the index of their cluster's centre."""
    kept = best(scores, keep)
    dropped = [i for i in range(len(scores)) if i not in kept]
    if not dropped:
        return kept, {}
    recycled = int(0.3 * len(dropped)) + 1
    chosen = [dropped[i] for i in best([scores[i] for i in dropped], recycled)]
    members = density_peaks(hidden[chosen], recycled // 10 + 1, cosine, divide)
    reduce = np.mean if mean else np.sum
    return kept, {chosen[c]: reduce(hidden[[chosen[i] for i in group]], axis=0) for c, group in members.items()}
