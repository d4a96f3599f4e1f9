"""One of the two processes that test_parallel.py starts: python two_processes.py RANK FOLDER

Each builds the same tiny models, whole and then spread over both processes (tensor parallel), and writes what recipes
keep and give on either to FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from families import build, inputs
from glimpses import Looking
from kinds import ATTENTION, KINDS, fixed, recipe, stage
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import tokenprune as tp
from tokenprune.errors import UnsupportedModelError
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

FAMILIES = ("llava", "qwen2_5_vl")  # one key head for each query head, and for two
GRAVITY = stage(2, fixed(0.4), raters="all_text", scorer={**ATTENTION, "gravity": True})
GLIMPSE = Looking(vectors=torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))
RECIPES = {
    "attention": KINDS["attention"],
    "adaptive": KINDS["adaptive"],
    "gravity": recipe("gravity", GRAVITY),
    "glimpse": Pipeline([Stage(place=4, scorer=GLIMPSE, scheduler=FixedScheduler(keep=6))], depth=6, name="glimpse"),
}


def spread(model: Any) -> Any:
    """`model` by its own plan over both processes, as from_pretrained(tp_plan="auto") does while it loads weights."""
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_plan="auto", tp_size=2))
    return apply_tensor_parallelism(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)


def outcomes(family: str, model: Any) -> dict[str, Any]:
    batch = inputs(family, model)
    found = {}
    for name, data in RECIPES.items():
        with tp.attach(model, data) as attached, torch.no_grad():
            logits = model(**batch).logits
            kept = [stage.kept for stage in attached.report.stages]
            answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
        found[name] = {"logits": logits, "kept": kept, "answer": answer}
    return found


def refusal(model: Any, **more: Any) -> str:
    try:
        tp.attach(model, KINDS["attention"], **more)
    except UnsupportedModelError as error:
        return str(error)
    return "nothing"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    result: dict[str, Any] = {}
    for family in FAMILIES:
        model = build(family, layers=6)
        result[family] = {"one": outcomes(family, model), "two": outcomes(family, spread(model))}
    odd = build("llava", layers=6)
    odd.config.text_config.num_key_value_heads = 1  # what attach is told; the weights are never called
    result["refusals"] = refusal(spread(odd)), refusal(model, compile=True)
    torch.save(result, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
