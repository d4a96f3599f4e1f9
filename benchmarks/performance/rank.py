"""The rank of raters × vision tokens: Gram matrix in float64 against an SVD in float32, time and integer.

    python benchmarks/performance/rank.py            # writes rank.json beside it, a quarter of a minute on one core

Time is the median of interleaved pairs, of the ratio too. The integer is compared on attention-like matrices (softmax
of random logits, mixtures of few such rows, and these stored in bfloat16), 60 for each shape.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tokenprune.core import ranks

SHAPES = ((8, 576), (16, 576), (32, 576), (64, 576), (128, 576), (256, 576), (32, 2880), (64, 2880), (64, 16384))
PAIRS = 9


def attention(raters: int, tokens: int, seed: int, kind: str) -> Tensor:
    """``[1, raters, tokens]`` float32 rows that sum up to 1."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "full":
        logits = torch.randn(raters, tokens, generator=generator)
        return torch.softmax(2 * logits, -1)[None]
    rank = max(2, raters // 4)
    mixture = torch.softmax(torch.randn(raters, rank, generator=generator), -1)
    rows = mixture @ torch.softmax(3 * torch.randn(rank, tokens, generator=generator), -1)
    return (rows.bfloat16().float() if kind == "bfloat16" else rows)[None]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(raters: int, tokens: int) -> dict[str, float | int]:
    matrix = attention(raters, tokens, 0, "full")
    rows, columns = torch.tensor([raters]), torch.tensor([tokens])

    def gram() -> Tensor:
        return ranks.numerical_rank(matrix, rows, columns)

    def svd() -> Tensor:
        return torch.linalg.matrix_rank(matrix)

    for warm in (gram, svd):
        warm()
    pairs = [(seconds(svd), seconds(gram)) for _ in range(PAIRS)]
    same = total = 0
    if raters * tokens <= 64 * 2880:
        for kind in ("full", "low", "bfloat16"):
            for seed in range(20):
                one = attention(raters, tokens, seed, kind)
                same += int(ranks.numerical_rank(one, rows, columns) == torch.linalg.matrix_rank(one))
                total += 1
    return {
        "raters": raters,
        "tokens": tokens,
        "svd_ms": 1e3 * median(pair[0] for pair in pairs),
        "gram_ms": 1e3 * median(pair[1] for pair in pairs),
        "ratio": median(before / after for before, after in pairs),
        "compared": total,
        "same": same,
    }


def main() -> None:
    torch.set_num_threads(1)
    found = [measure(*shape) for shape in SHAPES]
    for row in found:
        print(
            "{raters:>4} × {tokens:<6} SVD {svd_ms:8.3f} ms, Gram {gram_ms:8.3f} ms, ratio {ratio:5.1f}".format(**row)
        )
    facts = {"torch": torch.__version__, "threads": 1, "machine": platform.machine(), "device": "cpu", "rows": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
