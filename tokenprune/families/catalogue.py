"""The supported families: one line adds one, and everything that asks for a family's adapter asks here.

Other packages add families by entry points (`plugins.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

from tokenprune.errors import PluginWarning, UnsupportedModelError, did_you_mean
from tokenprune.families import plugins
from tokenprune.families.adapter import Adapter
from tokenprune.families.aria import Aria
from tokenprune.families.cohere import AyaVision, Cohere2Vision
from tokenprune.families.deepseek import DeepseekVL, DeepseekVLHybrid, Janus
from tokenprune.families.gemma import Gemma3, Gemma4, PaliGemma
from tokenprune.families.glm import Glm4v, Glm4vMoe, Glm46v, GlmOcr
from tokenprune.families.idefics import Idefics2, Idefics3, SmolVLM
from tokenprune.families.internvl import InternVL
from tokenprune.families.kimi import Kimi
from tokenprune.families.lfm2 import Lfm2VL
from tokenprune.families.llava import Llava, LlavaNext
from tokenprune.families.llava_next_video import LlavaNextVideo
from tokenprune.families.llava_onevision import LlavaOnevision
from tokenprune.families.minicpm import MiniCPMV
from tokenprune.families.mistral import LightOnOcr, Mistral3
from tokenprune.families.molmo import Molmo2
from tokenprune.families.ovis import Ovis2
from tokenprune.families.qwen import (
    PaddleOcr,
    Qwen2,
    Qwen2_5,
    Qwen2_5Omni,
    Qwen3,
    Qwen3_5,
    Qwen3_5Moe,
    Qwen3Moe,
    Qwen3Omni,
)
from tokenprune.families.timm_towers import FastVlm, PerceptionLM
from tokenprune.families.video_llava import VideoLlava
from tokenprune.families.vipllava import VipLlava

ADAPTERS: tuple[Adapter, ...] = (
    Llava(),
    LlavaNext(),
    LlavaNextVideo(),
    LlavaOnevision(),
    VipLlava(),
    VideoLlava(),
    Qwen2(),
    Qwen2_5(),
    Qwen3(),
    Qwen3Moe(),
    Qwen3_5(),
    Qwen3_5Moe(),
    Qwen2_5Omni(),
    Qwen3Omni(),
    InternVL(),
    Gemma3(),
    Gemma4(),
    PaliGemma(),
    AyaVision(),
    Cohere2Vision(),
    Idefics2(),
    Idefics3(),
    SmolVLM(),
    Mistral3(),
    LightOnOcr(),
    Glm4v(),
    Glm46v(),
    Glm4vMoe(),
    GlmOcr(),
    DeepseekVL(),
    DeepseekVLHybrid(),
    Janus(),
    Ovis2(),
    Aria(),
    PaddleOcr(),
    Kimi(),
    Lfm2VL(),
    MiniCPMV(),
    Molmo2(),
    FastVlm(),
    PerceptionLM(),
)
"""In the order in which people are told of them; docs/models.md says what is tested for each."""


_ONE_MODULE = "one module embeds the picture and runs the layers, so no call between the two shows vision tokens"
REFUSED: dict[str, str] = {
    "mllama": "layers of cross-attention read its pictures, and the sequence holds no vision tokens",
    "florence2": "it is an encoder and a decoder: vision tokens stand in the encoder alone",
    "blip-2": "its decoders (OPT, T5) have no rotary embeddings, and a picture is no more than 32 queries",
    "instructblip": "its decoders (OPT, T5) have no rotary embeddings, and a picture is no more than 32 queries",
    "chameleon": _ONE_MODULE,
    "phi4_multimodal": _ONE_MODULE,
    "llama4": "its layers without rotary embeddings scale queries by their place in the sequence at hand, which moves "
    "when tokens are dropped",
    "gemma3n": "its layers run on four versions of the hidden states at once",
}
"""Families that cannot be supported as they are, by `model_type`, and why; docs/models.md shows it."""


def families() -> tuple[str, ...]:
    """The `model_type` of each supported family, ours first; no plug-in is imported for it."""
    return tuple(dict.fromkeys([*_shipped(), *plugins.declared()]))


def adapters() -> dict[str, Adapter]:
    """The adapter of each supported family, by `model_type`; of plug-ins that cannot be used it warns."""
    found = _shipped()
    for family in plugins.declared():
        try:
            found[family] = found.get(family) or plugins.load(family)
        except UnsupportedModelError as error:
            warnings.warn(str(error), PluginWarning, stacklevel=2)
    return found


def adapter_of(model_or_config: Any, *, asker: str, hint: str = "") -> Adapter:
    """The adapter of a transformers model, or of its configuration.

    Args:
        model_or_config: of one of the supported families.
        asker: what needs it; opens the error message.
        hint: closes the error message: what else can be done.

    Raises:
        UnsupportedModelError: a family that nobody adapted, or of `REFUSED`; or a plug-in's that cannot be used.
    """
    shipped = _shipped()
    family = _family(model_or_config)
    if family in shipped:
        return shipped[family]
    if family in plugins.declared():
        return plugins.load(family)
    if family in REFUSED:
        raise UnsupportedModelError(f"{asker}: {family} is not supported: {REFUSED[family]}{hint}")
    known = families()
    raise UnsupportedModelError(
        f"{asker}: no adapter for {_named(model_or_config)}{did_you_mean(family, known)}; supported: "
        f"{', '.join(known)}{hint}"
    )


def fitting(adapter: Adapter, model: Any, *, asker: str) -> Adapter:
    """`adapter`, which the caller brings, if it is one for `model`.

    Raises:
        UnsupportedModelError: it is no adapter, is unfinished, or is for another `model_type`.
    """
    plugins.check_adapter(adapter, f"{asker}: adapter")
    if _family(model) != adapter.family:
        raise UnsupportedModelError(
            f"{asker}: adapter {type(adapter).__name__} is for model_type {adapter.family!r}, got {_named(model)}"
        )
    return adapter


def _shipped() -> dict[str, Adapter]:
    return {adapter.family: adapter for adapter in ADAPTERS}


def _family(model_or_config: Any) -> Any:
    return getattr(getattr(model_or_config, "config", model_or_config), "model_type", None)


def _named(model_or_config: Any) -> str:
    """Class and family, for messages."""
    kind, family = type(model_or_config).__name__, _family(model_or_config)
    return kind if family is None else f"{kind} (model_type {family!r})"
