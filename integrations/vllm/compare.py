"""Does vLLM with the plug-in answer as tokenprune in transformers does? Greedy, float32, on the CPU.

The two want different versions of transformers, so each half runs in an environment of its own:

    python compare.py reference FOLDER [WORD ...]  # tokenprune with its own transformers: questions and answers
    python compare.py vllm FOLDER [WORD ...]       # vLLM with the plug-in: asks again; exit code 1 if not equal

Models: the embedded LLaVA on scenes, and random ones of the other families (`subjects.py`). Nothing is downloaded.
Words choose: llava, onevision, qwen2_5, qwen3 for models; several for prompts of several pictures alone, embeds for
pictures that `tp.encode` has encoded, ranks for tensor parallel.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

TOKENS = 12
MODELS = {
    "llava": "TokenpruneLlava",
    "onevision": "TokenpruneLlavaOnevision",
    "qwen2_5": "TokenpruneQwen2_5_VL",
    "qwen3": "TokenpruneQwen3VL",
}
"""Name here, and architecture of the plug-in."""
KINDS = ("several", "embeds", "ranks")
SCORERS = {"uniform": "constant", "random": "random", "norm": "norm"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM is run with; one process, unless a script says otherwise."""
ENCODED = "encoded.pt"
"""Embeddings of the pictures, one for each question."""
ONE_AXIS = {"rope_theta": 10000.0, "rope_type": "default"}
SECTION = {"llava": [16, 0, 0], "onevision": [16, 0, 0]}
"""Models of one axis: half the size of a head."""


DIVPRUNE = {"place": "after_vision", "scheduler": {"type": "fixed", "keep": 20}, "sampler": "max_min"}
"""Tokens of a picture that are unlike each other, so many of each."""


def recipe(name: str, keep: float, positions: str = "original", **more: Any) -> dict[str, Any]:
    """Keep nothing out where the name is ``none``."""
    one = {
        "place": "after_vision",
        "scorer": {"type": SCORERS.get(name, "constant")},
        "scheduler": {"type": "fixed", "keep": keep},
        "sampler": "uniform" if name == "uniform" else "top_k",
        "positions": positions,
        **more,
    }
    return {"version": 1, "name": name, "stages": [] if name == "none" else [one]}


def conditions() -> list[dict[str, Any]]:
    """Model, recipe, and further arguments of vLLM."""
    made: list[dict[str, Any]] = [
        {"model": "llava", "recipe": recipe(name, 36, positions)}
        for name in SCORERS
        for positions in ("renumber", "original")
    ]
    made.append({"model": "llava", "recipe": recipe("norm", 36), **chunks(24)})
    made.append({"model": "llava", "recipe": recipe("norm", 36), "vllm": {"block_size": 32}, "what": "prefix cache"})
    made.append({"model": "llava", "recipe": recipe("norm", 36, "renumber"), "embeds": True, "what": "tp.encode"})
    ranks = {"vllm": {"tensor_parallel_size": 2}, "ranks": True, "what": "two ranks"}
    made.append({"model": "llava", "recipe": recipe("norm", 36), **ranks})
    for model in ("onevision", "qwen2_5", "qwen3"):
        made += [{"model": model, "recipe": recipe(name, 0.5)} for name in ("none", *SCORERS)]
        # A whole picture has to fit the encoder's cache, which is as large as a chunk.
        made.append({"model": model, "recipe": recipe("norm", 0.5), **chunks(88 if model == "onevision" else 24)})
    made.append({"model": "onevision", "recipe": recipe("norm", 0.5, "renumber")})
    for model in MODELS:
        # Two and three pictures of several sizes in each prompt.
        apart = [recipe("norm", 0.5), recipe("random", 0.5), {**recipe("norm", 0.5), "stages": [DIVPRUNE]}]
        apart.append({**recipe("two-stages", 0.7), "stages": [*recipe("norm", 0.7)["stages"], DIVPRUNE]})
        made += [{"model": model, "recipe": {**one, "pictures": "apart"}, "several": True} for one in apart]
    made.append({"model": "llava", "recipe": {**recipe("norm", 36, "renumber"), "pictures": "apart"}, "several": True})
    return made


def chunks(size: int) -> dict[str, Any]:
    """Prefill in steps of so many tokens, which split pictures."""
    more = {"max_num_batched_tokens": size, "max_num_seqs": 8, "disable_chunked_mm_input": False}
    return {"vllm": more, "what": f"chunks of {size}"}


def key(condition: dict[str, Any]) -> str:
    """What names the answers of the reference."""
    stages = condition["recipe"]["stages"]
    how = stages[0].get("sampler") if stages == [DIVPRUNE] else condition["recipe"]["name"]
    positions = stages[0].get("positions", "original") if stages else "-"
    return f"{asked_key(condition)} {how} {positions}"


def asked_key(condition: dict[str, Any]) -> str:
    """What names the questions."""
    return condition["model"] + (" several" if condition.get("several") else "")


# ------------------------------------------------------------------------------------------------------- transformers


def reference(folder: Path, words: list[str]) -> None:
    """Write pictures, questions, the random models and all answers into `folder`."""
    import torch
    from subjects import make

    import tokenprune as tp

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "answers.json"
    told = json.loads(file.read_text()) if file.exists() else {"asked": {}, "answers": {}}
    subjects: dict[str, Any] = {}
    done: set[str] = set()
    for condition in chosen(words):
        name, asked = key(condition), asked_key(condition)
        if name in done and not condition.get("embeds"):
            continue
        done.add(name)
        if asked not in subjects:
            subjects[asked] = make(condition["model"], folder, several=condition.get("several", False))
            told["asked"][asked] = subjects[asked].asked
        subject = subjects[asked]
        if condition.get("embeds"):
            files = [folder / each["pictures"][0] for each in subject.asked]
            encoded = tp.encode(subject.model, subject.processor, files, condition["recipe"])
            torch.save([each.hidden for each in encoded], folder / ENCODED)
            continue
        with tp.attach(subject.model, condition["recipe"]), torch.inference_mode():
            told["answers"][name] = [_answer(subject, each, folder) for each in subject.asked]
        print(f"reference: {name}: {len(subject.asked)} answers", flush=True)
    file.write_text(json.dumps(told))


def _answer(subject: Any, each: dict[str, Any], folder: Path) -> list[int]:
    inputs = subject.inputs(each["prompt"], pictures_of(each, folder))
    made = subject.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def pictures_of(each: dict[str, Any], folder: Path) -> list[Any]:
    from PIL import Image

    return [Image.open(folder / name).convert("RGB") for name in each["pictures"]]


def chosen(words: list[str]) -> list[dict[str, Any]]:
    """The conditions that the words of the command line name; all without."""
    models = [word for word in words if word in MODELS] or list(MODELS)
    return [
        condition
        for condition in conditions()
        if condition["model"] in models and all(condition.get(word) for word in words if word in KINDS)
    ]


# --------------------------------------------------------------------------------------------------------------- vLLM


def served(folder: Path, words: list[str]) -> bool:
    """Ask vLLM; prints a row for each condition. Whether all answers are equal."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    told = json.loads((folder / "answers.json").read_text())
    good = True
    for condition in chosen(words):
        asked, expected = told["asked"][asked_key(condition)], told["answers"][key(condition)]
        got, cached, lengths = _ask(folder, condition, asked)
        same = sum(_cut(a) == _cut(b) for a, b in zip(got, expected, strict=True))
        good = good and same == len(expected)
        print(
            f"{key(condition):34} {condition.get('what', ''):14} same {same}/{len(expected)}  "
            f"prompt {lengths}  from cache {cached}",
            flush=True,
        )
        gc.collect()
    return good


def _cut(ids: list[int], end: int = 2) -> list[int]:
    """Up to the token that ends an answer: engines differ in whether they return it."""
    return ids[: ids.index(end)] if end in ids else ids


def _ask(
    folder: Path, condition: dict[str, Any], asked: list[dict[str, Any]]
) -> tuple[list[list[int]], int, list[int]]:
    import torch
    from vllm import LLM, SamplingParams

    from tokenprune.scenes import embedded_path

    torch.set_num_threads(1)
    model, made = condition["model"], condition["recipe"]
    overrides: dict[str, Any] = {"architectures": [MODELS[model]], "tokenprune": {"recipe": made}}
    more = {"max_num_seqs": 8, **condition.get("vllm", {}), "enable_mm_embeds": condition.get("embeds", False)}
    if condition.get("ranks"):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # a core each, on a machine of one NUMA node
    if not made["stages"] or made["stages"][0].get("positions", "original") == "original":
        more |= {"video_pruning_rate": 1e-18, "worker_cls": "tokenprune_vllm.cpu.Worker"}
        if model in SECTION:
            overrides["text_config"] = {"rope_parameters": {**ONE_AXIS, "mrope_section": SECTION[model]}}
    engine = LLM(
        str(embedded_path() if model == "llava" else folder / model),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        hf_overrides=overrides,
        limit_mm_per_prompt={"image": max(len(each["pictures"]) for each in asked)},
        **more,
    )
    requests = [{"prompt": each["prompt"], "multi_modal_data": {"image": pictures_of(each, folder)}} for each in asked]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=model != "llava")
    out = engine.generate(requests, sampling, use_tqdm=False)
    cached = sum(each.num_cached_tokens or 0 for each in out)
    return (
        [list(each.outputs[0].token_ids) for each in out],
        cached,
        sorted({len(each.prompt_token_ids) for each in out}),
    )


def main() -> int:
    halves = {"reference": reference, "vllm": served}
    given = sys.argv[1:]
    if len(given) < 2 or given[0] not in halves or set(given[2:]) - {*MODELS, *KINDS}:
        print(__doc__)
        return 2
    return 1 if halves[given[0]](Path(given[1]), given[2:]) is False else 0


if __name__ == "__main__":
    sys.exit(main())
