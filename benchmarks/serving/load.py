"""vLLM under load, with and without a recipe: requests a second, time to the first token, KV blocks in use.

    python benchmarks/serving/load.py [--rounds 3] [--models qwen llava] [--threads 1]

Needs an environment with vLLM and the plug-in (integrations/vllm). Every side is a process of its own with one engine;
the sides take turns, round by round and load by load, so that all meet the same machine, and only one works at a time.
Requests come as soon as a place is free (a closed loop), so a round tells how much an engine can do, and what a request
then waits. Pictures are new in every round, the same for all sides. Writes load.json beside this file, round by round.

`qwen`: a Qwen2.5-VL of 4 layers with dummy weights and 576 vision tokens a picture, so that the prefill takes time.
`llava`: the embedded LLaVA, whose prefill takes almost none. What takes time in a model is its shape.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

OUT = Path(__file__).with_name("load.json")
SIDES = {
    "qwen": ("untouched", "none", "divprune", "random", "smaller-image"),
    "llava": ("untouched", "divprune", "random"),
    "steps": ("untouched", "divprune", "divprune/640"),
}
"""`none`: the plug-in with a recipe that keeps everything. The tower of LLaVA has one size: no smaller image there, and
`untouched` is the plug-in with `none`, as vLLM 0.32 does not load the checkpoint.
`steps`: the model of `qwen`, and `/640` where a step of the scheduler takes at most 640 tokens in place of 2048, so as
many pictures as the untouched model's."""
LOADS = {"1 in flight": (1, 4, 1), "8 in flight": (8, 16, 1), "32 in flight": (32, 32, 1), "repeated": (8, 16, 8)}
"""Requests in flight, requests, and how often each picture is asked about."""
SIDE, SMALL = 672, 336
"""Pixels of a picture, and of a smaller one with as many tokens as are kept: 24 x 24 and 12 x 12."""
KEEP, TOKENS, WORDS, BLOCK = 0.25, 8, 24, 32
"""Share of the vision tokens, new tokens of an answer, words of a prompt, tokens of a KV block."""
PAD = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
VOCABULARY = 600


# ------------------------------------------------------------------------------------------------------------- a side


def serve(model: str, side: str, folder: Path) -> None:
    """One engine: a line of JSON in for each load, a line of JSON out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    engine = Engine(model, side, folder)
    print(json.dumps(engine.facts), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.drive(**json.loads(line))), file=out, flush=True)


class Engine:
    """vLLM in this process, so that its scheduler and its parts can be watched."""

    def __init__(self, model: str, side: str, folder: Path) -> None:
        import torch
        import vllm

        self.model, self.side = model, side
        started = time.perf_counter()
        self.llm = vllm.LLM(str(_embedded() if model == "llava" else folder / model), **_settings(model, side))
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.pool = core.scheduler.kv_cache_manager.block_pool
        runner = core.model_executor.driver_worker.worker.model_runner
        self.seconds = {"tower": 0.0, "choosing": 0.0}
        net = runner.get_model()
        self._watch(net, "embed_multimodal", "tower")
        if hasattr(net, "reducer"):
            self._watch(net.reducer, "prune", "choosing")
        self.facts = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "start_seconds": time.perf_counter() - started,
            "kv_blocks": self.pool.num_gpu_blocks,
        }

    def _watch(self, owner: Any, method: str, name: str) -> None:
        """Add up the time that a method takes."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        object.__setattr__(owner, method, timed)

    def drive(self, flight: int, count: int, repeat: int, seed: int) -> dict[str, Any]:
        """Answer `count` requests, `flight` of them at a time; each picture is asked about `repeat` times."""
        import vllm

        requests = deque(self._requests(count, repeat, seed))
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        self.seconds.update(tower=0.0, choosing=0.0)
        came: dict[str, float] = {}
        first: dict[str, float] = {}
        peak, preparing, cached, lengths = 0, 0.0, 0, set()
        free = self.pool.get_num_free_blocks()
        start = time.perf_counter()
        while requests or came:
            while requests and len(came) < flight:
                name, prompt = requests.popleft()
                came[name] = time.perf_counter()
                self.engine.add_request(name, prompt, sampling)
                preparing += time.perf_counter() - came[name]
            told = self.engine.step()
            peak = max(peak, free - self.pool.get_num_free_blocks())
            now = time.perf_counter()
            for each in told:
                if each.outputs and each.outputs[0].token_ids and each.request_id not in first:
                    first[each.request_id] = now - came[each.request_id]
                if each.finished:
                    del came[each.request_id]
                    cached += each.num_cached_tokens or 0
                    lengths.add(len(each.prompt_token_ids))
        return {
            "seconds": time.perf_counter() - start,
            "first_token": sorted(first.values()),
            "peak_blocks": peak,
            "prompt": sorted(lengths),
            "from_cache": cached,
            "preparing": preparing,
            "choosing": self.seconds["choosing"],
            "tower": self.seconds["tower"] - self.seconds["choosing"],
        }

    def _requests(self, count: int, repeat: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
        """Names and prompts; one picture's questions come one after the other."""
        import numpy as np
        from PIL import Image

        draw = np.random.default_rng(seed)
        size = 84 if self.model == "llava" else SMALL if self.side == "smaller-image" else SIDE
        made = []
        for number in range(count):
            if number % repeat == 0:
                colours = draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                picture = Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC).resize((size, size))
            words = [f"w{draw.integers(0, 500)}" for _ in range(WORDS)]
            text = f"<|vision_start|> <|image_pad|> <|vision_end|> {' '.join(words)}"
            if self.model == "llava":
                text = "<image>which colour does the square in the picture have ?<answer>"
            made.append((f"{seed}-{number}", {"prompt": text, "multi_modal_data": {"image": picture}}))
        return made


def _embedded() -> Path:
    from tokenprune.scenes import embedded_path

    return Path(embedded_path())


def _settings(model: str, side: str) -> dict[str, Any]:
    """Arguments of vLLM."""
    side, _, step = side.partition("/")
    made: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "max_num_batched_tokens": int(step or 2048),
        "block_size": BLOCK,
        "enforce_eager": True,
        "seed": 0,
        "limit_mm_per_prompt": {"image": 1},
    }
    if model != "llava":
        made |= {"load_format": "dummy"}
    if model != "llava" and side in ("untouched", "smaller-image"):
        return made
    recipe: dict[str, Any] = {"recipe": side, "keep": KEEP}
    if side in ("none", "untouched"):
        recipe = {"recipe": "none"}
    overrides = {
        "architectures": ["TokenpruneLlava" if model == "llava" else "TokenpruneQwen2_5_VL"],
        "tokenprune": recipe,
    }
    if model == "llava":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 0, 0]}
        overrides |= {"text_config": {"rope_parameters": rope}}
    more = {"video_pruning_rate": 1e-18, "worker_cls": "tokenprune_vllm.cpu.Worker"}
    return {**made, **more, "hf_overrides": overrides}


# ----------------------------------------------------------------------------------------------------------- the model


def make_qwen(folder: Path) -> None:
    """Configuration, tokenizer and processor of a Qwen2.5-VL of 4 layers; vLLM makes up the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

    words = ["<pad>", "<s>", "</s>", *PAD, "<unk>", *[f"w{number}" for number in range(VOCABULARY - 8)]]
    ids = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=PAD, **special).save_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<pad>"],
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 512,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    shared = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen2_5_VLProcessor"}
    shared |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    shared |= {"size": {"shortest_edge": 784, "longest_edge": SIDE * SIDE}}
    for file, kind in (("preprocessor", "image"), ("video_preprocessor", "video")):
        name = "Qwen2VLImageProcessor" if kind == "image" else "Qwen2VLVideoProcessor"
        told = {**shared, f"{kind}_processor_type": name}
        (folder / f"{file}_config.json").write_text(json.dumps(told))


# ---------------------------------------------------------------------------------------------------------- the rounds


class Side:
    """A process with an engine."""

    def __init__(self, model: str, side: str, folder: Path, threads: int) -> None:
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        quiet |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        quiet |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [sys.executable, __file__, "--serve", model, side, "--folder", str(folder)]
        self.errors = (folder / f"{model}-{side.replace('/', '-')}.log").open("w+")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env={**os.environ, **quiet}
        )

    def read(self) -> dict[str, Any]:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"an engine ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def drive(self, **load: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(load) + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(models: list[str], rounds: int, threads: int, out: Path) -> None:
    told: dict[str, Any] = {
        "models": json.loads(out.read_text())["models"] if out.exists() else {},
        "machine": {"device": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "settings": {"rounds": rounds, "keep": KEEP, "new_tokens": TOKENS, "block": BLOCK, "loads": LOADS},
    }
    with TemporaryDirectory() as made:
        folder = Path(made)
        for model in models:
            if model != "llava":
                (folder / model).mkdir()
                make_qwen(folder / model)
            sides = {side: Side(model, side, folder, threads) for side in SIDES[model]}
            facts = {side: each.read() for side, each in sides.items()}  # they start side by side
            kept: dict[str, Any] = {side: {load: [] for load in LOADS} for side in sides}
            for number in range(-1, rounds):  # the first one warms up
                for load, (flight, count, repeat) in LOADS.items():
                    order = list(sides)
                    order = order[number % len(order) :] + order[: number % len(order)]
                    for side in order:
                        seed = 1000 * (number + 1) + list(LOADS).index(load)
                        some = count if number >= 0 else min(4, count)
                        run = sides[side].drive(flight=flight, count=some, repeat=repeat, seed=seed)
                        if number >= 0:
                            kept[side][load].append(run)
                print(f"{model}: round {number + 1} of {rounds}", flush=True)
                told["models"][model] = {"facts": facts, "summary": summary(kept) if number >= 0 else {}, "runs": kept}
                out.write_text(json.dumps(told) + "\n")
            for each in sides.values():
                each.end()
            show(model, told["models"][model]["summary"])


def summary(kept: dict[str, Any]) -> dict[str, Any]:
    """What each side did under each load; ratios are the median over rounds of those within a round."""
    made: dict[str, Any] = {}
    for load, (_, count, _) in LOADS.items():
        base = kept["untouched"][load]
        for side, loads in kept.items():
            runs = loads[load]
            first = sorted(each for run in runs for each in run["first_token"])
            faster = sorted(one["seconds"] / run["seconds"] for one, run in zip(base, runs, strict=True))
            made.setdefault(load, {})[side] = {
                "requests_per_second": median(count / run["seconds"] for run in runs),
                "times_untouched": median(faster),
                "times_untouched_range": [faster[0], faster[-1]],
                "first_token_p50": first[len(first) // 2],
                "first_token_p99": first[min(len(first) - 1, int(0.99 * len(first)))],
                "first_tokens": len(first),
                "peak_blocks": max(run["peak_blocks"] for run in runs),
                "prompt": runs[0]["prompt"],
                "from_cache": median(run["from_cache"] for run in runs),
                **{
                    name: median(run[name] / run["seconds"] for run in runs)
                    for name in ("preparing", "tower", "choosing")
                },
            }
    return made


def show(model: str, told: dict[str, Any]) -> None:
    print(f"\n{model}")
    for load, sides in told.items():
        for side, row in sides.items():
            low, high = row["times_untouched_range"]
            print(
                f"{load:13} {side:14} {row['requests_per_second']:6.2f}/s  {row['times_untouched']:.2f} "
                f"({low:.2f}-{high:.2f}) x  first token {1000 * row['first_token_p50']:6.0f} p50 "
                f"{1000 * row['first_token_p99']:6.0f} p99 ms  blocks {row['peak_blocks']:4}  "
                f"cache {row['from_cache']:6.0f}  "
                f"preparing {row['preparing']:.0%} tower {row['tower']:.0%} choosing {row['choosing']:.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--serve", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve, given.folder)
    else:
        measure(given.models, given.rounds, given.threads, given.out)


if __name__ == "__main__":
    main()
