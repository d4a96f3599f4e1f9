"""What a server is not started with, and the message of each: nothing that would be wrong in silence starts.

    python refusals.py          # in vLLM's environment; exit code 1 if something starts, or fails for another reason

The embedded model on the CPU. Each start ends before weights are loaded or right behind them.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from compare import ENVIRONMENT, ONE_AXIS, SECTION, recipe

ROPE = {"text_config": {"rope_parameters": {**ONE_AXIS, "mrope_section": SECTION["llava"]}}}
ONE = {"limit_mm_per_prompt": {"image": 1}}
ORIGINAL = {**ONE, "video_pruning_rate": 1e-18, "worker_cls": "tokenprune_vllm.cpu.Worker"}
RENUMBER = recipe("norm", 36, "renumber")
ADAPTIVE = {"version": 1, "stages": [{"place": "after_vision", "scorer": "norm", "scheduler": {"type": "outliers"}}]}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adaptive counts": ({"recipe": ADAPTIVE}, ONE, "its counts depend on the data"),
    "rated by text": ({"recipe": "cdpruner"}, ONE, "it is rated by text"),
    "before a layer": ({"recipe": "fastv"}, ONE, "it acts between layers of the language model"),
    "in the tower": ({"recipe": "tome"}, ONE, "an engine's tower runs whole"),
    "a signal of the tower": ({"recipe": "fastervlm"}, ONE, "of the tower, and the engine gives none"),
    "a name with a slip": ({"recipe": "divprun"}, ONE, "did you mean"),
    "a key with a slip": ({"recipe": "uniform", "kepe": 0.25}, ONE, "did you mean 'keep'"),
    "no recipe": ({}, ONE, 'expected "tokenprune"'),
    "several pictures": ({"recipe": RENUMBER}, {}, '"pictures": "apart"'),
    "a shared KV store": ({"recipe": RENUMBER}, {**ONE, "kv_transfer_config": "example"}, "a shared KV store"),
    "no hook": ({"recipe": recipe("norm", 36)}, ONE, "--video-pruning-rate 1e-18"),
    "no CPU worker": (
        {"recipe": recipe("norm", 36)},
        {**ORIGINAL, "worker_cls": "auto"},
        "--worker-cls tokenprune_vllm",
    ),
    "embeddings": ({"recipe": recipe("norm", 36)}, {**ORIGINAL, "enable_mm_embeds": True}, "takes no embeddings"),
}
"""What stands behind "tokenprune" in the overrides, further arguments, and a part of the message."""


def start(given: dict[str, Any], more: dict[str, Any]) -> str:
    """The message of a start that is refused; empty if it is not."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from tokenprune.scenes import embedded_path

    more = dict(more)
    if "kv_transfer_config" in more:
        more["kv_transfer_config"] = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    overrides = {"architectures": ["TokenpruneLlava"], "tokenprune": given}
    overrides |= ROPE if "video_pruning_rate" in more else {}
    try:
        LLM(
            str(embedded_path()),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            enforce_eager=True,
            hf_overrides=overrides,
            **more,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    for name, value in {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "CRITICAL"}.items():
        os.environ.setdefault(name, value)
    good = True
    for name, (given, more, part) in CASES.items():
        message = start(given, more)
        right = part in message
        good = good and right
        print(f"{'refused' if right else 'WRONG':8} {name:22} {message or 'started'}", flush=True)
        gc.collect()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
