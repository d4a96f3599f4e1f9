"""`model_shape`: the numbers of a model's configuration that the ledger needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenprune.cost.shape import ClipShape, DecoderShape, ModelShape, QwenShape, VisionShape
from tokenprune.errors import UnsupportedModelError, did_you_mean


def model_shape(model_or_config: Any, *, name: str | None = None) -> ModelShape:
    """The shape of a transformers model, or of its configuration: no weights are needed.

    Args:
        model_or_config: of one of the supported families.
        name: how tables call it; its own path or family when left out.

    Raises:
        UnsupportedModelError: another family, or a vision tower that nobody has counted.
    """
    config = getattr(model_or_config, "config", model_or_config)
    family = getattr(config, "model_type", None)
    if family not in _VISION:
        got = type(model_or_config).__name__ if family is None else f"model_type {family!r}"
        raise UnsupportedModelError(
            f"ledger: no shape known for {got}{did_you_mean(family, _VISION)}; supported: {', '.join(_VISION)}"
        )
    return ModelShape(
        name=name or getattr(config, "_name_or_path", "") or family,
        family=family,
        decoder=_decoder(config.get_text_config()),
        vision=_VISION[family](config),
    )


def _decoder(text: Any) -> DecoderShape:
    heads = int(text.num_attention_heads)
    return DecoderShape(
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        mlp=int(text.intermediate_size),
        vocab=int(text.vocab_size),
    )


def _clip(config: Any) -> VisionShape:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise UnsupportedModelError(
            f"ledger: expected a CLIP vision tower (clip_vision_model), got {vision.model_type}"
        )
    layers = int(vision.num_hidden_layers)
    read = config.vision_feature_layer
    read = [read] if isinstance(read, int) else list(read)  # of the hidden states: 0 is what enters the first layer
    last = max(at if at >= 0 else layers + 1 + at for at in read)
    width, out = int(vision.hidden_size), int(config.text_config.hidden_size)
    return ClipShape(
        layers=layers,
        width=width,
        mlp=int(vision.intermediate_size),
        matrices=2,
        patch=int(vision.num_channels * vision.patch_size**2),
        projector=((width * len(read), out), (out, out)),
        unused=layers - last,
        side=int(vision.image_size // vision.patch_size),
        class_token=config.vision_feature_select_strategy == "default",
    )


def _qwen2(config: Any) -> VisionShape:
    vision = config.vision_config
    width = int(vision.embed_dim)
    return _qwen(vision, width, mlp=int(width * vision.mlp_ratio), out=int(vision.hidden_size))


def _qwen2_5(config: Any) -> VisionShape:
    vision = config.vision_config
    return _qwen(
        vision,
        int(vision.hidden_size),
        mlp=int(vision.intermediate_size),
        out=int(vision.out_hidden_size),
        matrices=3,
        window=int(vision.window_size // vision.spatial_merge_size // vision.patch_size),
        full=tuple(vision.fullatt_block_indexes),
    )


def _qwen3(config: Any) -> VisionShape:
    vision = config.vision_config
    return _qwen(
        vision,
        int(vision.hidden_size),
        mlp=int(vision.intermediate_size),
        out=int(vision.out_hidden_size),
        projectors=1 + len(vision.deepstack_visual_indexes),
    )


def _qwen(vision: Any, width: int, *, mlp: int, out: int, matrices: int = 2, **more: Any) -> QwenShape:
    merge = int(vision.spatial_merge_size)
    joined = width * merge**2
    return QwenShape(
        layers=int(vision.depth),
        width=width,
        mlp=mlp,
        matrices=matrices,
        patch=int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2),
        projector=((joined, joined), (joined, out)),
        merge=merge,
        **more,
    )


_VISION: dict[str, Callable[[Any], VisionShape]] = {
    "llava": _clip,
    "llava_next": _clip,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
}
