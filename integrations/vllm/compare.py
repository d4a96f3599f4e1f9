"""Does vLLM with the plug-in answer as tokenprune in transformers does? Greedy, float32, on the CPU.

The two want different versions of transformers, so each half runs in an environment of its own:

    python compare.py reference FOLDER     # tokenprune with its own transformers: questions, pictures and answers
    python compare.py vllm FOLDER          # vLLM with the plug-in: asks again, prints a table; exit code 1 if not equal

Models: the embedded LLaVA on scenes, and a random Qwen2.5-VL, which tells tokens apart all the better. Nothing is
downloaded.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

TOKENS = 12
SCORERS = {"uniform": "constant", "random": "random", "norm": "norm"}
QWEN_WORDS = "w5 w6 <|vision_start|> <|image_pad|> <|vision_end|> "
QWEN_SIZES = [(168, 168), (224, 112), (112, 224), (280, 140)]


def recipe(name: str, keep: float, positions: str = "original") -> dict[str, Any]:
    """Keep nothing out where the name is ``none``."""
    one = {
        "place": "after_vision",
        "scorer": {"type": SCORERS.get(name, "constant")},
        "scheduler": {"type": "fixed", "keep": keep},
        "sampler": "uniform" if name == "uniform" else "top_k",
        "positions": positions,
    }
    return {"version": 1, "name": name, "stages": [] if name == "none" else [one]}


def conditions() -> list[dict[str, Any]]:
    """Model, recipe, and further arguments of vLLM."""
    made: list[dict[str, Any]] = [
        {"model": "llava", "recipe": recipe(name, 36, positions), "vllm": {}}
        for name in SCORERS
        for positions in ("renumber", "original")
    ]
    chunks = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "disable_chunked_mm_input": False}
    made.append({"model": "llava", "recipe": recipe("norm", 36), "vllm": {**chunks}, "what": "chunks of 24"})
    made.append({"model": "llava", "recipe": recipe("norm", 36), "vllm": {"block_size": 32}, "what": "prefix cache"})
    return made + [{"model": "qwen", "recipe": recipe(name, 0.5), "vllm": {}} for name in ("none", *SCORERS)]


def key(condition: dict[str, Any]) -> str:
    """What names the answers of the reference."""
    stages = condition["recipe"]["stages"]
    return f"{condition['model']} {condition['recipe']['name']} {stages[0]['positions'] if stages else '-'}"


# ------------------------------------------------------------------------------------------------------- transformers


def reference(folder: Path) -> None:
    """Write pictures, questions, the random model and all answers into `folder`."""
    import torch

    import tokenprune as tp

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    asked: dict[str, list[dict[str, str]]] = {"llava": [], "qwen": []}
    model, processor = tp.load("embedded")
    for number, case in enumerate(tp.scene_cases(5)):
        path = folder / f"scene{number}.png"
        case.picture().save(path)
        asked["llava"].append(
            {"prompt": f"<image>{case.question}<answer>", "picture": path.name, "answer": case.answer}
        )
    answers: dict[str, list[list[int]]] = {}
    subjects = {"llava": (model.float(), processor), "qwen": _qwen(folder, asked["qwen"])}
    for condition in conditions():
        if key(condition) in answers:
            continue
        model, processor = subjects[condition["model"]]
        with tp.attach(model, condition["recipe"]), torch.inference_mode():
            rows = [_answer(model, processor, each, folder) for each in asked[condition["model"]]]
        answers[key(condition)] = rows
        print(f"reference: {key(condition)}: {len(rows)} answers", flush=True)
    (folder / "answers.json").write_text(json.dumps({"asked": asked, "answers": answers}))


def _answer(model: Any, processor: Any, each: dict[str, str], folder: Path) -> list[int]:
    from PIL import Image

    picture = Image.open(folder / each["picture"]).convert("RGB")
    inputs = processor(images=picture, text=each["prompt"], return_tensors="pt")
    if "image_grid_thw" in inputs:
        # The tiny processor has no prompt of its own: placeholders are written out here.
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def _qwen(folder: Path, asked: list[dict[str, str]]) -> tuple[Any, Any]:
    """A random Qwen2.5-VL in `folder`/qwen, with a tokenizer of words; questions about pictures of noise."""
    import numpy as np
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = ["<pad>", "<s>", "</s>", *[f"w{i}" for i in range(3, 195)], *special, "<unk>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special,
    )
    text = {
        "vocab_size": 200,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=195,
        video_token_id=196,
        vision_start_token_id=197,
        vision_end_token_id=198,
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.mul_(10)
            elif weight.ndim == 2 and "embed" not in name:
                sharp = "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight"))
                weight.mul_(6 if sharp else 3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    shared = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 784, "longest_edge": 112896},
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    images = {**shared, "processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "qwen" / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "qwen" / "video_preprocessor_config.json").write_text(json.dumps(shared))
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(QWEN_SIZES):
        noise = random.integers(0, 255, (height // 28, width // 28, 3), dtype=np.uint8)
        path = folder / f"noise{number}.png"
        Image.fromarray(noise).resize((width, height), 0).save(path)
        words_behind = " ".join(f"w{(7 * number + 3 * j) % 180 + 3}" for j in range(9))
        asked.append({"prompt": QWEN_WORDS + words_behind, "picture": path.name, "answer": ""})
    return model, _QwenProcessor(tokenizer)


class _QwenProcessor:
    """Pixels by the family's own image processor, and its placeholders: the family's processor wants torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        mean = [0.5] * 3
        self.images = Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, image_mean=mean, image_std=mean, min_pixels=784, max_pixels=112896
        )

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, Any]:
        made = dict(self.images(images=[images], return_tensors=return_tensors))
        many = int(made["image_grid_thw"].prod()) // 4
        ids = self.tokenizer(text.replace("<|image_pad|>", "<|image_pad|> " * many), return_tensors=return_tensors)
        return {**made, "input_ids": ids["input_ids"]}


# --------------------------------------------------------------------------------------------------------------- vLLM


def served(folder: Path) -> bool:
    """Ask vLLM; prints a row for each condition. Whether all answers are equal."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)
    _mend_cpu_runner()
    told = json.loads((folder / "answers.json").read_text())
    good = True
    for condition in conditions():
        asked, expected = told["asked"][condition["model"]], told["answers"][key(condition)]
        got, cached, lengths = _ask(folder, condition, asked)
        same = sum(_cut(a) == _cut(b) for a, b in zip(got, expected, strict=True))
        good = good and same == len(expected)
        print(
            f"{key(condition):28} {condition.get('what', ''):14} same {same}/{len(expected)}  "
            f"prompt {lengths}  from cache {cached}",
            flush=True,
        )
        gc.collect()
    return good


def _cut(ids: list[int], end: int = 2) -> list[int]:
    """Up to the token that ends an answer: engines differ in whether they return it."""
    return ids[: ids.index(end)] if end in ids else ids


def _ask(
    folder: Path, condition: dict[str, Any], asked: list[dict[str, str]]
) -> tuple[list[list[int]], int, list[int]]:
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    from tokenprune.scenes import embedded_path

    torch.set_num_threads(1)
    llava, made = condition["model"] == "llava", condition["recipe"]
    architecture = "TokenpruneLlava" if llava else "TokenpruneQwen2_5_VL"
    overrides: dict[str, Any] = {"architectures": [architecture], "tokenprune": {"recipe": made}}
    more = dict(condition["vllm"])
    if not made["stages"] or made["stages"][0]["positions"] == "original":
        more["video_pruning_rate"] = 1e-18
        if llava:
            rope = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [16, 0, 0]}
            overrides["text_config"] = {"rope_parameters": rope}
    engine = LLM(
        str(embedded_path() if llava else folder / "qwen"),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        hf_overrides=overrides,
        limit_mm_per_prompt={"image": 1} if llava else {"image": 1, "video": 0},
        **{"max_num_seqs": 8, **more},
    )
    requests = [
        {
            "prompt": each["prompt"],
            "multi_modal_data": {"image": Image.open(folder / each["picture"]).convert("RGB")},
        }
        for each in asked
    ]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=not llava)
    out = engine.generate(requests, sampling, use_tqdm=False)
    cached = sum(each.num_cached_tokens or 0 for each in out)
    return (
        [list(each.outputs[0].token_ids) for each in out],
        cached,
        sorted({len(each.prompt_token_ids) for each in out}),
    )


def _mend_cpu_runner() -> None:
    """The CPU runner of vLLM 0.32 loads models without setting the flag that its GPU parent sets: for tests only."""
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker import cpu_model_runner

    runner = cpu_model_runner.CPUModelRunner
    load = runner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        asked = bool(config and config.is_multimodal_pruning_enabled())
        self.is_multimodal_pruning_enabled = asked and supports_multimodal_pruning(self.get_model())

    runner.load_model = load_model


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("reference", "vllm"):
        print(__doc__)
        return 2
    if sys.argv[1] == "reference":
        reference(Path(sys.argv[2]))
        return 0
    return 0 if served(Path(sys.argv[2])) else 1


if __name__ == "__main__":
    sys.exit(main())
