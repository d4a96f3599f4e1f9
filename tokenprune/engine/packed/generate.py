"""Greedy answers to many questions about few pictures, with everything that the questions share computed once.

A decoder is causal: what stands before a question does not depend on it, until a stage lets it choose. Below the first
such stage a picture is run once, and the questions read its keys and values. Stages run in the hooks of the attached
recipe, as they do under `generate`; the model's own layers do the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.attach import Attached
from tokenprune.engine.packed.prompt import PackedPrompt
from tokenprune.engine.packed.runs import Apart, Together
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import end_tokens
from tokenprune.pipeline import Pipeline

HARMLESS = frozenset(
    {
        *("_from_model_config", "bos_token_id", "decoder_start_token_id", "do_sample", "eos_token_id", "max_length"),
        *("max_new_tokens", "num_beams", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("pad_token_id", "return_dict_in_generate", "temperature", "top_k", "top_p", "transformers_version"),
        "use_cache",
    }
)
"""Fields of a `GenerationConfig` that leave greedy decoding with a limit of its own as it is, or that are read here."""


def check_packable(model: Any) -> None:
    """Raise `UnsupportedModelError`, with the reason, unless questions to `model` can share their picture."""
    parts = anatomy(model)
    text, settings = parts.text, model.generation_config
    attention = str(getattr(text.config, "_attn_implementation", ""))
    changed = sorted(set(settings.to_diff_dict()) - HARMLESS)
    if not parts.adapter.packs:
        reason = f"a picture of {parts.adapter.title} does not stand in the prompt like one of LLaVA-1.5"
    elif not hasattr(text, "norm"):
        reason = f"{type(text).__name__} has no final norm under that name"
    elif attention not in ("sdpa", "eager"):
        reason = f"attention is {attention!r}, not sdpa or eager"
    elif changed:
        reason = f"its generation settings change what greedy decoding does: {', '.join(changed)}"
    else:
        return
    raise UnsupportedModelError(f"packed: {reason}; ask it by generate")


def shares_caches(attached: Attached) -> bool:
    """Whether questions may share the caches of their picture: ``kv: all_layers`` shortens them for each alone, and a
    glimpse behind the prompt runs through all layers below its stage."""
    return all(stage.kv != "all_layers" and not stage.reads.glimpse for stage in attached.engine.pipeline)


def shared_layers(pipeline: Pipeline, depth: int) -> int:
    """How many layers see the same prefix whatever the question: all of them if no stage looks at the question."""
    # Any other budget may ask for the length of the question.
    blind = pipeline.budget is None or pipeline.budget.kind in ("keep", "average", "final")
    if blind and not any(stage.reads.depends_on_question for stage in pipeline):
        return depth
    # A stage that reads an earlier layer's hidden states must see that layer run with the question.
    needed = [
        layer - max(stage.reads.earlier, default=1) + 1
        for stage, layer in zip(pipeline, pipeline.layers(depth), strict=True)
    ]
    return max(0, min(needed))


@torch.inference_mode()
def generate_packed(attached: Attached, prompt: PackedPrompt, *, max_new_tokens: int) -> Tensor:
    """Greedy answers, ``[Q, tokens]`` int64, with the pad token behind the end of each.

    Equals ``model.generate(do_sample=False)`` on the single prompts but for rounding. `attached.report` then has a row
    for each question; its seconds are those of the whole batch.

    Args:
        attached: the recipe, on a model that `check_packable` lets pass.
        prompt: from `pack`, of the same model.
        max_new_tokens: longest answer, in tokens.
    """
    run = packed_run(attached, prompt)
    ends, pad = end_tokens(attached.anatomy.model)
    stop = torch.tensor(ends, device=prompt.owner.device)
    logits = run.prefill()
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    made: list[Tensor] = []
    while True:
        token = logits.float().argmax(-1).masked_fill(done, pad or 0)
        made.append(token)
        done = done | torch.isin(token, stop)
        if len(made) == max_new_tokens or bool(done.all()):
            return torch.stack(made, dim=1)
        logits = run.step(token)


def packed_run(attached: Attached, prompt: PackedPrompt) -> Together | Apart:
    """The batch, ready to start.

    Raises:
        UnsupportedModelError: a stage with ``kv: all_layers``.
    """
    depth = len(attached.anatomy.layers)
    if not shares_caches(attached):
        raise UnsupportedModelError(
            f"packed: recipe {attached.report.recipe!r} takes dropped tokens out of caches that questions about a "
            "picture share (kv: all_layers); ask it by generate"
        )
    shared = shared_layers(attached.engine.pipeline, depth)
    return Together(attached, prompt) if shared == depth else Apart(attached, prompt, shared)
