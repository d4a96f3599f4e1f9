"""`ModelShape`: the numbers of a vision-language model that decide what a forward costs.

Everything counts multiply-adds of matrix products and convolutions. Biases, norms, activations, rotary embeddings and
softmax do not count: they are linear in the tokens and below one per cent of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokenprune.core.grids import Grid, Tiles


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The language model."""

    layers: int
    width: int
    """Numbers per hidden state (D)."""
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the MLP (m)."""
    vocab: int
    matrices: int = 3
    """Matrices of the MLP: 3 when gated, else 2."""

    @property
    def projections(self) -> int:
        """Queries, keys, values and output of one layer's attention for one token."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)

    def feed_forward(self, matrices: int | None = None) -> int:
        """MLP of one layer for one token; `matrices` replaces its own."""
        return (self.matrices if matrices is None else matrices) * self.width * self.mlp

    def linear(self, matrices: int | None = None) -> int:
        """Projections and MLP of one layer for one token; `matrices` replaces those of the MLP."""
        return self.projections + self.feed_forward(matrices)

    def attention(self, queries: int, keys: int) -> int:
        """Scores and weighted sum of one layer, all pairs of queries and keys."""
        return 2 * queries * keys * self.heads * self.head_dim

    def causal(self, tokens: int) -> int:
        """`attention` of a prompt where each token sees itself and those before it: what a causal kernel needs."""
        return tokens * (tokens + 1) * self.heads * self.head_dim

    @property
    def head(self) -> int:
        """lm_head for one token."""
        return self.width * self.vocab

    def kv_numbers(self, tokens: int) -> int:
        """Numbers that one layer's cache holds of so many tokens."""
        return 2 * tokens * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class VisionShape(ABC):
    """A vision tower, and the projector or merger behind it."""

    layers: int
    width: int
    mlp: int
    matrices: int
    """Matrices of the MLP: 2, or 3 when gated."""
    patch: int
    """Numbers of a patch that enter the patch embedding: 3 · side², times the frames that it spans."""
    projector: tuple[tuple[int, int], ...]
    """(in, out) of the matrices that each vision token passes."""
    projectors: int = 1
    """How many of them run: Qwen3-VL has one more for each DeepStack level."""
    unused: int = 0
    """Of the layers, those at the end that run although nobody reads them (LLaVA takes the last layer but one)."""
    one_by_one: ClassVar[bool] = False
    """Whether the projector takes tokens one by one, so that parts may merge in front of it."""

    def layer(self, patches: int, pairs: int) -> int:
        """One layer on so many patches, of which so many pairs see each other."""
        return patches * self.width * (4 * self.width + self.matrices * self.mlp) + 2 * pairs * self.width

    def projected(self, tokens: int) -> int:
        """The projector for so many vision tokens."""
        return tokens * self.projectors * sum(a * b for a, b in self.projector)

    @abstractmethod
    def usual(self) -> tuple[Grid, ...]:
        """Grids of the picture that tables are made for, in vision tokens."""

    def resized(self) -> VisionShape:
        """The same tower on pictures of other sizes than it was trained on; itself where it takes any size."""
        return self

    def class_keys(self, total: int, grids: Sequence[Grid]) -> int | None:
        """Keys that the class tokens of a sample's images look at; None where there are no class tokens."""
        return None

    def pairs(self, total: int, grids: Sequence[Grid], layer: int) -> int | None:
        """Pairs of tokens of a sample's images that see each other in `layer`; None where nobody has counted them."""
        return None

    def pictures(self, total: int, grids: Sequence[Grid]) -> tuple[Grid, ...] | None:
        """What the tower sees of a sample, pictures and tiles, as grids of what will be vision tokens; None where
        nobody has counted them."""
        return None

    def block(self, picture: Grid, layer: int, left: int) -> int:
        """One layer on so many tokens of one of `pictures`, if those are known; about so much, unless `counts_tell`."""
        raise TypeError(f"{type(self).__name__} tells no pictures, so it has no layers of single ones")

    def counts_tell(self, picture: Grid, layer: int) -> bool:
        """Whether the cost of a layer follows from how many tokens are left, whichever they are."""
        return True

    def arriving(self, total: int, grids: Sequence[Grid], left: Sequence[int]) -> tuple[int, bool]:
        """Vision tokens of the sample when so many are left of each of `pictures`, and whether that is certain."""
        return sum(left), True

    @abstractmethod
    def tower(self, total: int, grids: Sequence[Grid]) -> int:
        """The tower for a sample's images, all layers that run."""

    @abstractmethod
    def projection(self, total: int, grids: Sequence[Grid]) -> int:
        """The projector for a sample's images."""


@dataclass(frozen=True, kw_only=True)
class ClipShape(VisionShape):
    """A ViT on square images with a class token, which attends to all of one image."""

    one_by_one: ClassVar[bool] = True
    side: int
    """Patches along a side of an image."""
    class_token: bool = True
    """Whether the projector leaves the class token out."""

    def usual(self) -> tuple[Grid, ...]:
        return ((1, self.side, self.side),)

    def resized(self) -> VisionShape:
        return AnyClip(**vars(self))

    def images(self, total: int, grids: Sequence[Grid]) -> int:
        """Images that the tower sees: as few as give so many tokens."""
        return math.ceil(total / (self.side**2 + (not self.class_token)))

    def class_keys(self, total: int, grids: Sequence[Grid]) -> int | None:
        return self.images(total, grids) * (self.side**2 + 1)

    def pairs(self, total: int, grids: Sequence[Grid], layer: int) -> int | None:
        return self.images(total, grids) * (self.side**2 + 1) ** 2

    def pictures(self, total: int, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        own: Grid = (1, self.side, self.side) if self.class_token else (1, 1, self.side**2 + 1)
        return (own,) * self.images(total, grids)

    def block(self, picture: Grid, layer: int, left: int) -> int:
        n = left + self.class_token
        return self.layer(n, n**2)

    def tower(self, total: int, grids: Sequence[Grid]) -> int:
        patches = self.side**2
        layers = self.layers * self.layer(patches + 1, (patches + 1) ** 2)
        return self.images(total, grids) * (patches * self.patch * self.width + layers)

    def projection(self, total: int, grids: Sequence[Grid]) -> int:
        return self.projected(self.images(total, grids) * (self.side**2 + (not self.class_token)))


@dataclass(frozen=True, kw_only=True)
class TiledClip(ClipShape):
    """The same ViT on an overview of each picture and on tiles of it, as LLaVA-NeXT does."""

    def usual(self) -> tuple[Grid, ...]:
        """A square picture: its overview and 2 × 2 tiles, whose rows end with a newline token."""
        return (*super().usual(), Tiles(1, 2 * self.side, 2 * self.side + 1))

    def images(self, total: int, grids: Sequence[Grid]) -> int:
        """Overviews and tiles that the tower sees.

        The grids of this shape come in pairs, an overview and its `Tiles`; plain tuples will do. Where they are no
        pairs, nothing is known of tiles: as few images as give so many tokens.
        """
        if not grids or len(grids) % 2:
            return super().images(total, grids)
        tiles = [self._tiles(grid) for grid in grids[1::2]]
        return len(tiles) + sum(tiles)

    def arriving(self, total: int, grids: Sequence[Grid], left: Sequence[int]) -> tuple[int, bool]:
        """Row separators stay. Of a tile that is cut behind the tower, as large a share is left as of the whole."""
        if not grids or len(grids) % 2:
            return min(total, sum(left)), False
        tokens, certain, at = 0, True, 0
        for tiled in grids[1::2]:
            _, rows, wide = tiled
            many = self._tiles(tiled)
            whole, shown = many * self.side**2, rows * (wide - 1)
            own = sum(left[at + 1 : at + 1 + many])
            tokens += left[at] + rows + (own if shown == whole else round(own * shown / whole))
            certain, at = certain and (shown == whole or own == whole), at + 1 + many
        return tokens, certain

    def _tiles(self, tiled: Grid) -> int:
        """Tiles are unpadded, so the last of a row or column may be cut; each row has a newline token at its end."""
        _, rows, wide = tiled
        return math.ceil(rows / self.side) * math.ceil((wide - 1) / self.side)


@dataclass(frozen=True, kw_only=True)
class AnyClip(ClipShape):
    """The same ViT on pictures of other sizes, whose position embeddings are interpolated to them."""

    def class_keys(self, total: int, grids: Sequence[Grid]) -> int | None:
        return sum(math.prod(grid) + 1 for grid in grids)

    def pairs(self, total: int, grids: Sequence[Grid], layer: int) -> int | None:
        return sum((math.prod(grid) + 1) ** 2 for grid in grids)

    def pictures(self, total: int, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        return tuple(grids if self.class_token else ((1, 1, math.prod(grid) + 1) for grid in grids))

    def tower(self, total: int, grids: Sequence[Grid]) -> int:
        sizes = [math.prod(grid) for grid in grids]
        layers = sum(self.layers * self.layer(n + 1, (n + 1) ** 2) for n in sizes)
        return sum(sizes) * self.patch * self.width + layers

    def projection(self, total: int, grids: Sequence[Grid]) -> int:
        return self.projected(total + (0 if self.class_token else len(grids)))


@dataclass(frozen=True, kw_only=True)
class QwenShape(VisionShape):
    """A ViT on pictures of any size, whose patches are merged before the language model."""

    merge: int = 2
    """Patches along a side of a vision token."""
    window: int | None = None
    """Vision tokens along a side of an attention window; None where all patches of a frame see each other."""
    full: tuple[int, ...] = ()
    """Layers without windows, where there are windows."""

    def usual(self) -> tuple[Grid, ...]:
        """24 × 24, as many as LLaVA-1.5 has: this tower takes any size."""
        return ((1, 24, 24),)

    def pairs(self, total: int, grids: Sequence[Grid], layer: int) -> int:
        if self.window is None or layer in self.full:
            seen = sum(t * (h * w) ** 2 for t, h, w in grids)
        else:
            seen = sum(t * _squares(h, self.window) * _squares(w, self.window) for t, h, w in grids)
        return self.merge**4 * seen

    def pictures(self, total: int, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        return tuple(grids)

    def block(self, picture: Grid, layer: int, left: int) -> int:
        """Of windows and of frames, each is taken to keep as large a share as the whole."""
        whole = math.prod(picture)
        pairs = self.pairs(whole, (picture,), layer) * left**2 // whole**2
        return self.layer(self.merge**2 * left, pairs)

    def counts_tell(self, picture: Grid, layer: int) -> bool:
        return picture[0] == 1 and (self.window is None or layer in self.full)

    def tower(self, total: int, grids: Sequence[Grid]) -> int:
        patches = self.merge**2 * sum(math.prod(grid) for grid in grids)
        layers = sum(self.layer(patches, self.pairs(total, grids, layer)) for layer in range(self.layers))
        return patches * self.patch * self.width + layers

    def projection(self, total: int, grids: Sequence[Grid]) -> int:
        return self.projected(total)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A vision-language model in numbers."""

    name: str
    family: str
    """`model_type` of its configuration."""
    decoder: DecoderShape
    vision: VisionShape


def _squares(side: int, window: int) -> int:
    """Sum of the squared lengths of the windows along a side; the last one may be cut short."""
    return side // window * window**2 + (side % window) ** 2
