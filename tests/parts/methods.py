"""Golden lines: what each recipe that comes with the package must do, one line a setting.

A new method is its part, its recipe and a line here: tests/parts/test_methods.py runs every check over all lines, and a
recipe without one is an error that prints the line to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import plain
from numpy.typing import NDArray
from parts import after_tower, after_vision, by_layers, by_tower, inside

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What the first stage of a recipe can see of one prompt, as plain arrays: N vision tokens, then T text tokens.

    `hidden [N, D]` vision tokens, `text [T, D]` embeddings, `q`, `k [H, N + T, d]` with the rotary embedding, `bare_q`,
    `bare_k` without it, `grid` (rows, columns), `frames` of them; `signals` by name, `[N, ...]`, and of the text tokens
    `states [T, D]` at the place and `text_keys [T, Hkv, d]` in the layer before.
    """

    hidden: Array
    text: Array
    q: Array
    k: Array
    bare_q: Array
    bare_k: Array
    grid: tuple[int, int]
    frames: int
    states: Array
    text_keys: Array
    signals: Mapping[str, Array] = field(default_factory=dict)

    @property
    def vision(self) -> range:
        """Places of the vision tokens."""
        return range(len(self.hidden))

    @property
    def last(self) -> int:
        """Place of the last text token."""
        return len(self.hidden) + len(self.text) - 1


Reference = Callable[[Seen, int], list[int]]
"""The paper in plain code: indices of the vision tokens that the first stage keeps, given the count it is to keep."""


def by_last_token(seen: Seen, keep: int) -> list[int]:
    return plain.fastv(plain.eager_attention(seen.q, seen.k), seen.vision, seen.last, keep)


def by_raters(seen: Seen, keep: int) -> list[int]:
    raters = plain.above_mean_raters(seen.hidden, seen.text)
    rows = [len(seen.hidden) + rater for rater in raters]
    return plain.best(plain.attention_scores(plain.eager_attention(seen.q, seen.k), rows, seen.vision), keep)


def by_position_free_attention(seen: Seen, keep: int) -> list[int]:
    """The best 30 % and every third row and column, however many that are: `keep` is not asked."""
    scores = plain.feather_scores(seen.bare_q, seen.bare_k, seen.vision, seen.last)
    return plain.feather(scores, 3 * len(scores) // 10, *seen.grid, 3)


def by_position(seen: Seen, keep: int) -> list[int]:
    return list(seen.vision)[len(seen.hidden) - keep :]


@dataclass(frozen=True)
class Golden:
    """One setting of a recipe and what it must do with a picture of `grid` (frames, rows, columns) in `depth` layers.

    Attributes:
        recipe: name of the recipe.
        layers: the layer before which each stage stands; 0 for a stage after vision.
        after: vision tokens after each stage, merged ones included; None where the picture decides.
        average: vision tokens that enter a layer, mean over the layers; None where the picture decides.
        variant: variant of the recipe.
        keep: budget; None takes the recipe's own.
        outputs: mean over the outputs of the layers, by which some papers count.
        renumbers: whether survivors get new position ids.
        reference: plain code of the paper for the first stage.
    """

    recipe: str
    layers: tuple[int, ...]
    after: tuple[int, ...] | None
    average: float | None
    variant: str | None = None
    keep: float | int | None = None
    outputs: float | None = None
    renumbers: bool = False
    reference: Reference | None = None
    grid: tuple[int, int, int] = (1, 24, 24)
    depth: int = 32

    @property
    def total(self) -> int:
        """Vision tokens of the picture."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    def __str__(self) -> str:
        budget = "" if self.keep is None else f" keep={self.keep}"
        return f"{self.recipe}{f':{self.variant}' if self.variant else ''}{budget} {self.depth} layers"


VIDEO = (8, 12, 6)

GOLDEN = (
    # FastV, table 1: K layers see all tokens, then R per cent are dropped.
    Golden("fastv", (2,), (288,), 306.0, outputs=297.0, reference=by_last_token),
    Golden("fastv", (3,), (144,), 184.5, variant="k3-r75", outputs=171.0, reference=by_last_token),
    # FEATHER, section 4: a union of best scores and a grid, so the picture decides; `fixed` bounds it.
    Golden("feather", (8, 16), None, None, reference=by_position_free_attention),
    Golden("feather", (8, 16), (275, 24), 263.0, variant="fixed", grid=(1, 27, 27)),
    # PyramidDrop: half of the tokens at each quarter of the depth.
    Golden("pyramiddrop", (8, 16, 24), (288, 144, 72), 270.0, outputs=254.25, reference=by_last_token),
    Golden("pyramiddrop", (2, 8, 16), (109, 20, 3), 62.9375, variant="64", outputs=45.03125),
    Golden("pyramiddrop", (7, 14, 21), (288, 144, 72), 270.0, depth=28),
    Golden(
        "pyramiddrop-code", (8, 16, 24), (288, 144, 72), 270.0, outputs=254.25, renumbers=True, reference=by_last_token
    ),
    # SparseVLM, version 1.5 and 2: the tables of the released code, named by the mean over outputs.
    Golden("sparsevlm-v1.5", (3, 7, 16), (309, 204, 112), 206.0, renumbers=True, reference=by_raters),
    Golden(
        "sparsevlm-v1.5",
        (3, 7, 16),
        (309, 204, 113),
        206.5,
        variant="192",
        outputs=192.03125,
        renumbers=True,
        reference=by_raters,
    ),
    Golden("sparsevlm-v1.5", (3, 7, 16), (312, 117, 39), 145.40625, variant="128", outputs=128.625, renumbers=True),
    Golden("sparsevlm-v1.5", (3, 7, 16), (249, 55, 27), 114.09375, variant="96", outputs=96.9375, renumbers=True),
    Golden("sparsevlm-v1.5", (3, 7, 16), (82, 32, 18), 82.25, variant="64", outputs=64.8125, renumbers=True),
    Golden("sparsevlm-v1.5", (3, 6, 14), (309, 204, 113), 5869 / 28, variant="192", depth=28, renumbers=True),
    Golden("sparsevlm-plus", (3, 7, 16), (300, 200, 117), 206.25),
    Golden("sparsevlm-plus", (3, 7, 16), (300, 200, 118), 206.75, variant="192", outputs=192.4375),
    Golden("sparsevlm-plus", (3, 7, 16), (238, 108, 60), 144.125, variant="128", outputs=128.0),
    Golden("sparsevlm-plus", (3, 7, 16), (246, 54, 28), 113.9375, variant="96", outputs=96.8125),
    Golden("sparsevlm-plus", (3, 7, 16), (66, 34, 20), 81.8125, variant="64", outputs=64.4375),
    # SparseVLM as in the paper, and its first release: the rank of the attention decides.
    Golden("sparsevlm", (3, 7, 16), None, None),
    Golden("sparsevlm-v1", (3, 7, 16, 20), None, None, renumbers=True),
    # Inside the vision tower.
    Golden("tome", (0,) * 6, (512, 448, 384, 320, 256, 192), 192.0, reference=inside.tome),
    Golden("tome", (0,) * 6, (512, 448, 384, 320, 256, 192), 192.0, variant="plain", reference=inside.tome),
    Golden("ailurus", (0,), (288,), 288.0, reference=inside.ailurus),
    # After vision, by features and question.
    Golden("divprune", (0,), (56,), 56.0, reference=after_vision.divprune),
    Golden("otprune", (0,), (56,), 56.0, reference=after_vision.otprune),
    Golden("diverse-merge", (0,), (63,), 63.0, keep=0.11, reference=after_vision.diverse),
    Golden("mmtok", (0,), (63,), 63.0, reference=after_vision.mmtok),
    Golden("mmtok", (0,), (64,), 64.0, variant="qwen", keep=64),
    Golden("mmtok", (0,), (63,), 63.0, variant="tower", reference=after_vision.mmtok_tower),
    Golden("cdpruner", (0,), (63,), 63.0, reference=after_vision.cdpruner),
    Golden("trim", (0,), None, None, reference=after_vision.trim),
    Golden("trim", (0,), (64,), 64.0, keep=64),
    Golden("eadp", (0,), (63,), 63.0, reference=after_vision.eadp),
    Golden("eadp", (0,), (64,), 64.0, variant="qwen", keep=64),
    # After vision, by the tower's attention.
    Golden("fastervlm", (0,), (64,), 64.0, reference=by_tower.fastervlm),
    Golden("visionzip", (0,), (64,), 64.0, reference=by_tower.fastervlm),
    Golden("visionzip", (0,), (128,), 128.0, variant="128", reference=by_tower.fastervlm),
    Golden("visionzip", (0,), (192,), 192.0, variant="192", reference=by_tower.fastervlm),
    Golden("vispruner", (0,), (64,), 64.0, reference=by_tower.vispruner),
    # VScan's averages of 64, 128 and 192 tokens, one third of them in the second half.
    Golden("vscan", (0, 16), (96, 32), 64.0, reference=by_tower.vscan),
    Golden("vscan", (0, 16), (192, 64), 128.0, variant="128", reference=by_tower.vscan),
    Golden("vscan", (0, 16), (288, 96), 192.0, variant="192", reference=by_tower.vscan),
    Golden("vscan", (0, 14), (96, 32), 64.0, variant="qwen", depth=28),
    Golden("hiprune", (0,), (64,), 64.0, reference=by_tower.hiprune),
    Golden("hiprune", (0,), (192,), 192.0, keep=192, reference=by_tower.hiprune),
    Golden("prumerge", (0,), None, None, reference=by_tower.prumerge),
    Golden("prumerge", (0,), (32,), 32.0, keep=32),
    Golden("prumerge-plus", (0,), None, None, reference=by_tower.prumerge_plus),
    Golden("scope", (0,), (64,), 64.0, reference=after_tower.scope),
    Golden("prunesid", (0,), (64,), 64.0, reference=after_tower.prunesid),
    Golden("prunesid", (0,), (128,), 128.0, variant="128"),
    Golden("prunesid", (0,), (192,), 192.0, variant="192"),
    Golden("holov", (0,), (64,), 64.0, reference=after_tower.holov),
    # Before a decoder layer.
    Golden("dart", (2,), (128,), 156.0, reference=by_layers.dart),
    Golden("dart", (2,), (64,), 96.0, variant="64", reference=by_layers.dart),
    Golden("greedyprune", (2,), (192,), 216.0, reference=by_layers.greedyprune),
    Golden("priortr", (2,), (128,), 156.0, reference=by_layers.priortr),
    Golden("v2drop", (3, 17, 22), (384, 307, 192), 329.96875, reference=by_layers.v2drop),
    Golden("star", (0, 16), (288, 144), 216.0, reference=by_layers.star),
    # TopV: a third of the tokens, and every fourth of the others.
    Golden("topv", (3,), (288,), 315.0, reference=by_layers.topv),
    Golden("pact", (5, 5), (316, 144), 211.5, reference=by_layers.pact),
    Golden("occamtoken", (4,), None, None, reference=by_last_token),
    # CLSE, table of counts: 192 is 208 layer inputs on average, and 64 is 81.
    Golden("clse", (1, 11, 21), (330, 210, 62), 208.0625),
    Golden("clse", (1, 11, 21), (110, 70, 20), 81.125, variant="64"),
    Golden("todre", (0, 24), (57, 0), 42.75, reference=by_layers.max_sum),
    Golden("vtw", (16,), (0,), 288.0),
    # Repair.
    Golden("restore", (0,), (64,), 64.0, reference=by_layers.restore),
    Golden("era", (0,), (32,), 32.0, reference=by_layers.max_sum),
    # Video: eight frames of 72 tokens.
    Golden("skip-vision", (0,), (256,), 256.0),
    Golden("skip-vision", (0,), (100,), 100.0, keep=100),
    Golden("evs", (0,), (144,), 144.0, grid=VIDEO, reference=by_layers.new_in_frame),
    Golden("dycoke", (0,), (273,), 273.0, grid=VIDEO, reference=by_layers.dycoke),
    Golden("vidcom2", (0,), (144,), 144.0, grid=VIDEO, reference=by_layers.vidcom2),
    Golden("vcast", (0,), (144,), 144.0, grid=VIDEO, reference=by_layers.vcast),
    Golden("fastvid", (0,), (57,), 57.0, grid=VIDEO, reference=by_layers.fastvid),
    Golden("holitom", (0, 18), (86, 43), 1978 / 28, grid=VIDEO, depth=28),
    Golden("prunevid", (0, 11), (233, 93), 141.125, grid=VIDEO, reference=by_layers.new_in_frame),
    Golden("recency", (0,), (191,), 191.0),
    # Baselines.
    Golden("last", (0,), (191,), 191.0, reference=by_position),
    Golden("last", (0,), (48,), 48.0, keep=48, reference=by_position),
    Golden("none", (), (), 576.0),
    Golden("pool", (0,), (144,), 144.0),
    Golden("random", (0,), (191,), 191.0),
    Golden("random", (0,), (64,), 64.0, keep=64),
    Golden("uniform", (0,), (191,), 191.0),
    Golden("uniform", (0,), (64,), 64.0, keep=64),
)
