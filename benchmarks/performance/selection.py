"""How long greedy selection takes, from similarities on: `python benchmarks/performance/selection.py [--threads 1]`.

Writes selection.json beside this file: the median of seven runs for 2880 tokens of which 320 are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from tokenprune.core import gram, greedy

N, K, WIDTH, RUNS = 2880, 320, 1024, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, N, 64, generator=generator) @ torch.randn(64, WIDTH, generator=generator)
    x = (x + torch.randn(1, N, WIDTH, generator=generator)).to(device)
    scores = torch.rand(1, N, generator=generator).to(device)
    alike = gram.cosines(x)
    gains = {
        "max_min": lambda: greedy.MaxMin(alike),
        "facility_location": lambda: greedy.Coverage(alike),
        "facility_location_covered": lambda: greedy.Coverage(alike, covered=scores),
        "facility_location_candidate": lambda: greedy.Coverage(alike, candidate=scores),
        "determinant": lambda: greedy.Determinant(alike, K, scores),
        "suppress": lambda: greedy.Suppression(scores, alike, 0.5),
    }
    seconds = {"similarities": timed(lambda: gram.cosines(x), device)}
    for name, gain in gains.items():
        seconds[name] = timed(lambda gain=gain: greedy.greedy(gain(), [K]), device)
        print(f"{name}: {seconds[name]:.3f} s", flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    path = Path(__file__).with_name("selection.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[device.type] = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": N,
        "kept": K,
        "width": WIDTH,
        "median_of": RUNS,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps(known[device.type], indent=2))


def timed(call, device: torch.device) -> float:
    """Median seconds of a call that has run once before."""
    times = []
    for _ in range(RUNS + 1):
        start = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return median(times[1:])


if __name__ == "__main__":
    main()
