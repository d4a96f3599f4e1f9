"""What a server is not started with, and the message of each: nothing that would be wrong in silence starts.

    python refusals.py [FOLDER]   # in vLLM's environment; exit code 1 if something starts, or fails for another reason

The embedded model on the CPU; with a folder of `compare.py`, its Qwen2.5-VL too. Each start ends before weights are
loaded or right behind them.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
    "a shared EC store": ({"recipe": RENUMBER}, {**ONE, "ec_transfer_config": "example"}, "encoded pictures"),
    "no hook": ({"recipe": recipe("norm", 36)}, ONE, "--video-pruning-rate 1e-18"),
    "no CPU worker": (
        {"recipe": recipe("norm", 36)},
        {**ORIGINAL, "worker_cls": "auto"},
        "--worker-cls tokenprune_vllm",
    ),
    "embeddings": ({"recipe": recipe("norm", 36)}, {**ORIGINAL, "enable_mm_embeds": True}, "takes no embeddings"),
}
"""What stands behind "tokenprune" in the overrides, further arguments, and a part of the message."""


def start(given: dict[str, Any], more: dict[str, Any], folder: Path | None = None, *, video: bool = False) -> str:
    """The message of a start that is refused, or of a request with a video; empty if nothing is.

    Args:
        given: what stands behind "tokenprune" in the overrides.
        more: further arguments.
        folder: of the random Qwen2.5-VL; the embedded LLaVA without.
        video: whether to ask about one.
    """
    from vllm import LLM
    from vllm.config import ECTransferConfig, KVTransferConfig

    from tokenprune.scenes import embedded_path

    more = dict(more)
    if "kv_transfer_config" in more:
        more["kv_transfer_config"] = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    if "ec_transfer_config" in more:
        more["ec_transfer_config"] = ECTransferConfig(
            ec_connector="ECExampleConnector",
            ec_role="ec_producer",
            ec_connector_extra_config={"shared_storage_path": "/"},
        )
    overrides = {"architectures": ["TokenpruneQwen2_5_VL" if folder else "TokenpruneLlava"], "tokenprune": given}
    overrides |= ROPE if "video_pruning_rate" in more and folder is None else {}
    try:
        engine = LLM(
            str(folder or embedded_path()),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            enforce_eager=True,
            hf_overrides=overrides,
            **more,
        )
        if video:
            told = {"fps": 1.0, "duration": 2.0, "total_num_frames": 2, "frames_indices": [0, 1]}
            frames = np.zeros((2, 64, 64, 3), dtype=np.uint8), told
            prompt = "w5 <|vision_start|> <|video_pad|> <|vision_end|> w6"
            engine.generate({"prompt": prompt, "multi_modal_data": {"video": frames}}, use_tqdm=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    for name, value in {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "CRITICAL"}.items():
        os.environ.setdefault(name, value)
    good = True
    cases = {name: (partial(start, given, more), part) for name, (given, more, part) in CASES.items()}
    if len(sys.argv) > 1:
        qwen = Path(sys.argv[1]) / "qwen2_5"
        cases["renumber on Qwen"] = (
            partial(start, {"recipe": RENUMBER}, ONE, qwen),
            "not supported for this architecture",
        )
        asks = partial(start, {"recipe": recipe("norm", 36)}, ORIGINAL, qwen, video=True)
        cases["a video"] = asks, "At most 0 video"
    for name, (refused, part) in cases.items():
        message = refused()
        right = part in message
        good = good and right
        print(f"{'refused' if right else 'WRONG':8} {name:22} {message or 'started'}", flush=True)
        gc.collect()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
