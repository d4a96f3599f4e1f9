"""Published shapes by name: numbers of the models' public config.json files, so that no download is needed."""

from __future__ import annotations

from tokenprune.cost.shape import ClipShape, DecoderShape, ModelShape, QwenShape, TiledClip

_VICUNA_7B = DecoderShape(layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32064)
_VICUNA_13B = DecoderShape(layers=40, width=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, vocab=32064)
_MISTRAL_7B = DecoderShape(layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32064)
_QWEN2_7B = DecoderShape(layers=28, width=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152064)


def _clip(width: int, kind: type[ClipShape] = ClipShape) -> ClipShape:
    """CLIP ViT-L/14 at 336 pixels, read one layer before its last, and two matrices to the decoder's width."""
    return kind(
        layers=24,
        width=1024,
        mlp=4096,
        matrices=2,
        patch=3 * 14**2,
        projector=((1024, width), (width, width)),
        unused=1,
        side=24,
    )


_TILED = _clip(4096, TiledClip)

_QWEN_VISION = QwenShape(
    layers=32,
    width=1280,
    mlp=3420,
    matrices=3,
    patch=3 * 2 * 14**2,
    projector=((5120, 5120), (5120, 3584)),
    window=4,
    full=(7, 15, 23, 31),
)

PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf, llava-v1.6-vicuna-7b-hf, llava-v1.6-mistral-7b-hf
        ModelShape(name="llava-1.5-7b", family="llava", decoder=_VICUNA_7B, vision=_clip(4096)),
        ModelShape(name="llava-1.5-13b", family="llava", decoder=_VICUNA_13B, vision=_clip(5120)),
        ModelShape(name="llava-next-7b", family="llava_next", decoder=_VICUNA_7B, vision=_TILED),
        ModelShape(name="llava-next-mistral-7b", family="llava_next", decoder=_MISTRAL_7B, vision=_TILED),
        # Qwen/Qwen2.5-VL-7B-Instruct
        ModelShape(name="qwen2.5-vl-7b", family="qwen2_5_vl", decoder=_QWEN2_7B, vision=_QWEN_VISION),
    )
}
