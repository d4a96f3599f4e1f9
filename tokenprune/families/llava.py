"""LLaVA-1.5 and LLaVA-NeXT: a CLIP tower, a projector of two matrices, a Llama or Mistral decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.core.grids import ClassToken, Grid, Tiles
from tokenprune.cost.shape import ClipShape, ModelShape, TiledClip, VisionShape
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.adapter import Adapter, VisionCall, VisionRow, decoder_arguments
from tokenprune.families.sides import largest_sides
from tokenprune.families.tower import Tower

HEAD = 64
"""Numbers per head of the published CLIP towers."""


class _Clip(Adapter):
    """What both families have in common: the tower, the projector and the way they are counted and scaled."""

    clip: ClassVar[type[ClipShape]]
    """How the tower's work follows from the grids."""

    def tower(self, base: Any) -> nn.Module | None:
        kind = base.config.vision_config.model_type
        tower: nn.Module = base.vision_tower
        return tower if kind in ("clip_vision_model", "siglip_vision_model") else None

    def tower_parts(self, base: Any) -> Tower:
        tower = super().tower_parts(base)
        # Strategy "full" makes a vision token of the class token, too.
        strategy = getattr(base.config, "vision_feature_select_strategy", "default")
        return tower if strategy == "default" else replace(tower, prefix=0)

    def projector(self, base: Any, tower: Tower) -> Callable[[Tensor], Tensor] | None:
        whole = isinstance(base.config.vision_feature_layer, int)  # else features of several layers stand side by side
        normed = base.config.vision_config.model_type != "clip_vision_model" and tower.last == tower.depth - 1
        return (lambda rows: base.multi_modal_projector(rows)) if whole and not normed else None

    def vision_shape(self, config: Any) -> VisionShape:
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
        return self.clip(
            layers=layers,
            width=width,
            mlp=int(vision.intermediate_size),
            matrices=2,
            patch=int(vision.num_channels * vision.patch_size**2),
            projector=((width * len(read), out), (out, out)),
            unused=layers - last,
            side=int(vision.image_size // vision.patch_size),
            class_token=getattr(config, "vision_feature_select_strategy", "default") == "default",
        )

    def published(self, shape: ModelShape) -> Any:
        import transformers as tf

        decoder, vision = shape.decoder, shape.vision
        assert isinstance(vision, ClipShape)
        clip = tf.CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.width // HEAD,
            image_size=14 * vision.side,
            patch_size=14,
        )
        return self.joined(clip, decoder_arguments(decoder), image_token_index=decoder.vocab - 1)

    @abstractmethod
    def joined(self, clip: Any, text: dict[str, Any], **more: Any) -> Any:
        """The configuration of the whole model: a tower, and the arguments of its decoder's configuration."""

    def deepen_tower(self, config: Any, ratio: float) -> None:
        vision = config.vision_config
        # The model reads the last layer but one: a tower has two at least.
        vision.num_hidden_layers = max(2, round(vision.num_hidden_layers * ratio))

    def widen_tower(self, config: Any, ratio: float) -> None:
        vision = config.vision_config
        size = min(HEAD, vision.hidden_size)
        vision.hidden_size = max(size, round(vision.hidden_size * ratio / size) * size)
        vision.num_attention_heads = vision.hidden_size // size
        vision.intermediate_size = max(64, round(vision.intermediate_size * ratio / 4) * 4)


class Llava(_Clip):
    """LLaVA-1.5: every picture is one rectangle of the tower's patches; as a rule the square it was trained on."""

    family = "llava"
    title = "LLaVA-1.5"
    pictures = "one square grid; other sizes where the tower is called with `interpolate_pos_encoding`"
    packs = True
    clip = ClipShape
    sizes = "image_sizes"

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        """From `image_sizes` (towers that take any size, such as Pixtral's); else all pictures have one size."""
        vision = base.config.vision_config
        if row.pictures is not None:
            return tuple((1, *_patches(base, size)) for size in row.pictures)
        rows, columns = _patches(base, row.pixels or (vision.image_size, vision.image_size))
        # Strategy "full" leaves the class token, where the tower has one, before the patches of its picture.
        strategy = getattr(base.config, "vision_feature_select_strategy", "default")
        full = strategy == "full" and vision.model_type == "clip_vision_model"
        n, whole = sum(row.runs), rows * columns + full
        if not rows * columns or n % whole:
            of = f"{rows} x {columns} patches and a class token" if full else f"{rows} x {columns}"
            raise InputError(
                f"expected whole images of {of} = {whole} vision tokens, got {n} in one sample: half a picture, or "
                "pictures of several sizes without image_sizes"
            )
        picture: tuple[Grid, ...] = ((1, rows, columns),)
        return ((ClassToken(), *picture) if full else picture) * (n // whole)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        return prod(_patches(base, size))

    def picture(self, config: Any, tokens: int | None = None) -> tuple[Grid, ...]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        many, left = divmod(side**2 if tokens is None else tokens, side**2)
        if left or not many:
            near = max(1, round((tokens or 0) / side**2)) * side**2
            raise InputError(f"tokens: a picture of this model has {side**2} vision tokens, got {tokens}; try {near}")
        return ((1, side, side),) * many

    def smaller_picture(self, config: Any, tokens: int) -> tuple[Grid, ...]:
        return ((1, *largest_sides(tokens)),)

    def pixels(
        self, config: Any, grids: Sequence[Grid], ids: Tensor, random: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        patch = config.vision_config.patch_size
        _, rows, columns = grids[0]
        size = (len(ids) * len(grids), 3, rows * patch, columns * patch)
        return {"pixel_values": torch.randn(size, generator=random).to(dtype)}

    def any_resolution(self, base: Any) -> AbstractContextManager[None]:
        """The tower interpolates its position embeddings to the size of the picture."""
        return _interpolated(base.vision_tower)

    def joined(self, clip: Any, text: dict[str, Any], **more: Any) -> Any:
        import transformers as tf

        return tf.LlavaConfig(vision_config=clip, text_config=tf.LlamaConfig(**text), **more)


class LlavaNext(_Clip):
    """LLaVA-NeXT: per picture a square overview, then unpadded tiles, each of their rows ended by a newline token.

    It makes no pictures of noise: how many tiles a picture has depends on its size in a way that no token count tells.
    """

    family = "llava_next"
    title = "LLaVA-NeXT"
    pictures = "an overview, then tiles whose rows end in a newline token"
    newline = "image_newline"
    tiles = True
    clip = TiledClip

    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        assert row.newline is not None
        grids: list[Grid] = []
        for start, end, video in row.spans():
            tell = self.video_grids if video else self._image_grids
            grids += tell(base, row.newline[start:end])
        return tuple(grids)

    def video_grids(self, base: Any, newline: Sequence[bool]) -> list[Grid]:
        """The grids of a run of video tokens, of which `newline` says whether they are the separator's embedding.

        Raises:
            InputError: they are no whole frames.
        """
        raise InputError(f"{self.title} has no video")

    def _image_grids(self, base: Any, newline: Sequence[bool]) -> list[Grid]:
        """Those of a run of image tokens: pictures without text between them."""
        vision = base.config.vision_config
        side = vision.image_size // vision.patch_size
        at, n = 0, len(newline)
        grids: list[Grid] = []
        while at < n:
            grids.append((1, side, side))
            at += side**2
            if at >= n or not any(newline[at:]):
                found = f"{n} vision tokens, {sum(newline)} of them the embedding image_newline"
                raise InputError(
                    f"expected for each image {side} x {side} tokens of the whole and rows of tiles that end in "
                    f"image_newline, got {found}: half a picture?"
                )
            width = newline.index(True, at) - at + 1
            rows = 0
            while at + width <= n and newline[at + width - 1] and not any(newline[at : at + width - 1]):
                rows, at = rows + 1, at + width
            grids.append(Tiles(1, rows, width))
        return grids

    def to_tokens(self, base: Any, tower: Tower, patches: Tensor, grids: Sequence[Grid], call: VisionCall) -> Tensor:
        """Tiles are laid out, unpadded and given newlines by the model's own function; newlines are rows of 0."""
        if call.sizes is None:
            raise InputError(
                "signals of the vision tower: pass image_sizes, as the processor gives them (of frames of video, which "
                "are pooled, none are read)"
            )
        vision, rows = base.config.vision_config, patches.reshape(patches.shape[0], -1)
        side = vision.image_size // vision.patch_size
        tiles = rows.unflatten(0, (-1, side**2))
        many = [self._tiles(base.config, size) for size in torch.as_tensor(call.sizes).tolist()]
        if sum(many) != len(tiles):
            raise InputError(
                f"signals of the vision tower: it saw {len(tiles)} tiles, but pictures of the given image_sizes have "
                f"{sum(many)}"
            )
        packed = self.packed(base, tiles.split(many), call.sizes, rows.new_zeros(rows.shape[1]))
        whole = torch.cat(list(packed)) if not isinstance(packed, Tensor) else packed.flatten(0, -2)
        return whole.reshape(-1, *patches.shape[1:])

    def packed(self, base: Any, tiles: Sequence[Tensor], sizes: Any, newline: Tensor) -> Any:
        """Vision tokens of each picture from its tiles ``[tiles, patches, C]``, by the model's own function."""
        return base.pack_image_features(tiles, sizes, base.config.vision_feature_select_strategy, newline)[0]

    def _tiles(self, config: Any, size: Sequence[int]) -> int:
        """Tiles of a picture of so many pixels, its overview included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        many: int = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return many

    def joined(self, clip: Any, text: dict[str, Any], **more: Any) -> Any:
        import transformers as tf

        language = tf.MistralConfig(**text, sliding_window=None)
        return tf.LlavaNextConfig(vision_config=clip, text_config=language, **more)


def _patches(base: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches of a picture of (height, width) pixels."""
    patch = base.config.vision_config.patch_size
    return size[0] // patch, size[1] // patch


@contextmanager
def _interpolated(tower: nn.Module) -> Iterator[None]:
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()
