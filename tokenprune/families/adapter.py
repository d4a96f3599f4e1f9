"""`Adapter`: everything that differs from one model family to the next, one method for each thing.

A family is one file beside this one that holds a subclass, and one line in `catalogue.py`. `family`, `title` and
`grids` are enough to attach recipes. Each other method opens one more door (ledger, bench, packed evaluation); those
without a sensible default refuse by name and say what to write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.core.grids import Grid
from tokenprune.cost.shape import DecoderShape, ModelShape, VisionShape
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.tower import PROVED, Order, Tower, find_tower, last_read, patches_along

_NO_PICTURES, _PICTURES = "nobody makes pictures of noise for", "picture, smaller_picture and pixels"
_NO_SCALE, _SCALE = "sketch: nothing scales the vision tower of", "deepen_tower and widen_tower"


@dataclass(frozen=True, eq=False)
class VisionRow:
    """The vision tokens of one sample, on the host: what `Adapter.grids` reads."""

    runs: tuple[int, ...]
    """Lengths of the uninterrupted runs of vision tokens, in order."""
    positions: np.ndarray | None
    """``[3, n]`` M-RoPE ids (time, height, width) of the vision tokens; None where the family has plain positions."""
    newline: tuple[bool, ...] | None
    """For each vision token whether it is the row separator of tiles; None where `Adapter.newline` is None."""
    pixels: tuple[int, int] | None
    """Height and width of each picture, where the model was given pictures of one size; else None."""
    pictures: tuple[tuple[int, ...], ...] | None = None
    """Size of each picture of the sample, as `Adapter.sizes` names it; None where it was not given, or does not fit."""
    videos: tuple[bool, ...] = ()
    """For each run whether it is of a video, where videos have a placeholder of their own; empty: none is."""

    def spans(self) -> Iterator[tuple[int, int, bool]]:
        """Start, end and whether it is a video, of each run; counted in vision tokens of the sample."""
        start = 0
        for run, video in zip_longest(self.runs, self.videos, fillvalue=False):
            yield start, start + run, bool(video)
            start += run


@dataclass(frozen=True, eq=False)
class VisionCall:
    """What the vision tower and the model were called with, as far as it tells where patches go."""

    grid: Tensor | None
    """``[pictures, 3]`` frames, rows and columns of patches; None where the tower is not told them."""
    sizes: Any
    """``image_sizes``: height and width of each picture in pixels; None where the model is not told them."""


class Adapter(ABC):
    """A model family, told apart by `config.model_type`. It has no state: one instance serves all models.

    `config` is always the transformers configuration of the whole model, `base` its `base_model`.
    """

    family: ClassVar[str]
    """`config.model_type` of the full model."""
    title: ClassVar[str]
    """Name for people."""
    pictures: ClassVar[str] = ""
    """The vision tokens of a picture in a few words, and what is peculiar to the family, for docs/models.md."""
    deepstack: ClassVar[str | None] = None
    """Method of the text model that adds vision features to early layers, at original indices (Qwen3-VL)."""
    per_token: ClassVar[Mapping[str, int]] = {}
    """Arguments of a decoder layer with an entry for each token, beside hidden states, mask and positions: their names,
    and their places where they come without (Gemma 4)."""
    newline: ClassVar[str | None] = None
    """Attribute of the base model: the embedding that ends a row of tiles (LLaVA-NeXT)."""
    sizes: ClassVar[str | None] = None
    """Argument of the model that tells the size of each picture, which `picture_tokens` reads; None: none is read."""
    vision: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    """Attributes of the base model that make vision tokens of pixels; bench times them."""
    order: ClassVar[Order] = "raster"
    """How the patches of a picture follow each other inside the vision tower."""
    packs: ClassVar[bool] = False
    """Whether questions may share their picture: its tokens do not depend on the text and have plain positions."""

    tiles: ClassVar[bool] = False
    """Whether its processor cuts tiles out of the whole picture, whatever it says about cropping and padding."""

    # What asking needs.

    def bare_prompt(self, question: str, images: int, marker: str) -> str:
        """The text that asks `question` about so many `images`, where the processor brings no chat template.

        Args:
            marker: the placeholder of an image.
        """
        return "USER: " + f"{marker}\n" * images + f"{question} ASSISTANT:"

    # What attaching needs.

    @abstractmethod
    def grids(self, base: Any, row: VisionRow) -> tuple[Grid, ...]:
        """(T, H, W) of each image of a sample, in vision tokens; their sizes sum to ``sum(row.runs)``.

        Raises:
            InputError: they cannot be told, and why. It refuses the prompt only where a part reads grids.
        """

    def picture_sizes(self, kwargs: Mapping[str, Any]) -> Any:
        """Sizes of the pictures ``[pictures, 2 or 3]`` among the arguments of the model; None where nothing tells."""
        return None if self.sizes is None else kwargs.get(self.sizes)

    def picture_tokens(self, base: Any, size: tuple[int, ...]) -> int:
        """Vision tokens of a picture of this size, as `sizes` names it: which pictures are whose in a batch."""
        self.refuse("no sizes of pictures are read for", "picture_tokens")

    def turns(self, attention: Any) -> bool:
        """Whether this decoder layer's attention has a rotary embedding: some layers of some families have none."""
        return bool(getattr(attention, "use_rope", True))

    def tower(self, base: Any) -> nn.Module | None:
        """The vision tower, where `compile=True` may compile it: one graph for each number of pictures. None: not."""
        return None

    # What signals of the vision tower and stages inside it need.

    def tower_parts(self, base: Any) -> Tower:
        """The blocks of the vision tower, told from its modules and from the configuration.

        Raises:
            UnsupportedModelError: nothing is found that projects queries and keys.
        """
        if self.family not in PROVED:
            raise UnsupportedModelError(
                f"attach: what happens inside the vision tower of {self.title} is not read yet: how its patches become "
                "vision tokens was not held against eager attention"
            )
        module = getattr(base, self.vision[0], None)
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(f"attach: {self.title} has no vision tower under the name {self.vision[0]!r}")
        tower = find_tower(module, side=patches_along(base.config), order=self.order)
        return replace(tower, last=last_read(base.config, tower.depth))

    def to_tokens(self, base: Any, tower: Tower, patches: Tensor, grids: Sequence[Grid], call: VisionCall) -> Tensor:
        """Rows of vision tokens ``[N, ...]`` from rows of patches ``[n, ...]``, as the projector puts them together.

        Args:
            base: the base model.
            tower: its `tower_parts`.
            patches: of all pictures, in the order of the tower, without what stands in front of them.
            grids: (T, H, W) of each picture, in vision tokens.
            call: what the tower was called with.

        Raises:
            InputError: patches and pictures do not fit.
        """
        return self.in_grid_order(tower, tower.to_tokens(patches, grids), call)

    def in_grid_order(self, tower: Tower, rows: Tensor, call: VisionCall) -> Tensor:
        """Rows of vision tokens ``[N, ...]`` in the order of their grid, from that of the tower (windows)."""
        return rows

    def projector(self, base: Any, tower: Tower) -> Callable[[Tensor], Tensor] | None:
        """What makes vision tokens ``[..., D]`` of rows of the last block that is read; None where it does not take
        them one by one, or something stands between."""
        return None

    def vision_modules(self, base: Any) -> list[nn.Module]:
        """The modules named by `vision` that this model has."""
        return [found for name in self.vision if (found := getattr(base, name, None)) is not None]

    # What the ledger needs.

    def shape(self, config: Any, name: str | None = None) -> ModelShape:
        """The numbers of a configuration that decide what a forward costs.

        Args:
            config: of the model.
            name: how tables call it; its own path or family when left out.

        Raises:
            UnsupportedModelError: the adapter has no `vision_shape`, or nobody has counted such a tower.
        """
        vision = self.vision_shape(config)  # first: where it is not known, that is what to say
        return ModelShape(
            name=name or getattr(config, "_name_or_path", "") or self.family,
            family=self.family,
            decoder=self.decoder_shape(config.get_text_config()),
            vision=vision,
        )

    def decoder_shape(self, text: Any) -> DecoderShape:
        """The shape of a decoder with grouped heads and a gated MLP, from its own configuration `text`."""
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

    def vision_shape(self, config: Any) -> VisionShape:
        """The shape of the vision tower and of the projector behind it."""
        self.refuse("ledger: no shape known for", "vision_shape")

    # What bench needs: prompts of noise, and models of random weights.

    def picture(self, config: Any, tokens: int | None = None) -> tuple[Grid, ...]:
        """Grids of pictures with so many vision tokens, as the model takes them; of one usual picture when not given.

        Raises:
            InputError: no number of whole pictures has so many tokens.
        """
        self.refuse(_NO_PICTURES, _PICTURES)

    def smaller_picture(self, config: Any, tokens: int) -> tuple[Grid, ...]:
        """Grids of one picture of at most `tokens` vision tokens, as near to them and to a square as can be."""
        self.refuse(_NO_PICTURES, _PICTURES)

    def pixels(
        self, config: Any, grids: Sequence[Grid], ids: Tensor, random: torch.Generator, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Noise for pictures with these grids, and whatever else `forward` takes beside ids and mask.

        Args:
            config: of the model.
            grids: of the pictures of each sample.
            ids: ``[B, L]`` input ids, whose placeholders stand for the pictures.
            random: draws the pixels.
            dtype: of the pixels.
        """
        self.refuse(_NO_PICTURES, _PICTURES)

    def any_resolution(self, base: Any) -> AbstractContextManager[None]:
        """Lets the model take the sizes of `smaller_picture` until it closes; by default it takes them as it is."""
        return nullcontext()

    def deepen_tower(self, config: Any, ratio: float) -> None:
        """Scale the depth of the vision tower in place, once the decoder of `config` has its new number of layers."""
        self.refuse(_NO_SCALE, _SCALE)

    def published(self, shape: ModelShape) -> Any:
        """A transformers configuration of this published shape (`tokenprune.cost.presets`)."""
        self.refuse("sketch: no configuration can be made for", "published")

    def widen_tower(self, config: Any, ratio: float) -> None:
        """Scale the width of the vision tower in place, once the decoder of `config` has its new `hidden_size`."""
        self.refuse(_NO_SCALE, _SCALE)

    def refuse(self, what: str, write: str) -> NoReturn:
        """Raise `UnsupportedModelError` that names the family and the methods which are missing."""
        raise UnsupportedModelError(
            f"{what} {self.family} ({self.title}): write {write} in its adapter, {type(self).__name__}"
        )


def decoder_arguments(decoder: DecoderShape) -> dict[str, Any]:
    """What a transformers text configuration takes to have this shape: the inverse of `Adapter.decoder_shape`."""
    return {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
        "max_position_embeddings": 32768,
    }
