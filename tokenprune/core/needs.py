"""`Needs`: what a part reads beside the tokens at its place, declared so that the engine records it and no more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction

from tokenprune.core.place import Place, PlaceError, block_at
from tokenprune.errors import RecipeError, did_you_mean

LAYERS = ("previous", "next")
TOWER = ("class_attention", "received_attention", "keys", "hidden")
"""Signals that a vision tower may give, one row for each vision token, whose patches are averaged:

- ``class_attention`` ``[B, N]`` float32: the class token's attention, mean over heads; of a tower without a class token
  `received_attention`, as the report then says.
- ``received_attention`` ``[B, N]`` float32: attention that a patch gets, mean over heads and over all tokens of its
  picture or frame, so 1/n where attention is even; who does not see it (another window) counts as 0.
- ``keys`` ``[B, N, H, d]``: keys, behind norms and before any rotary embedding.
- ``hidden`` ``[B, N, D]``: what leaves the block.

They are of the last block that the projector reads, or of the block behind an ``@``: ``keys@5`` (0-based), ``keys@-2``
(from the end), ``keys@1/4`` or ``keys@25%`` (a share of the depth).
"""


@dataclass(frozen=True)
class Needs:
    """What a part reads beside hidden states, places, masses and scores of the vision tokens that enter its stage.

    A part that reads something which it does not declare is told so by an `InputError`, wherever it runs.

        reads = Needs(attention="previous")               # of the layer that has run, by the stage's raters
        reads = Needs(question=True, embedding=True)      # compares words with picture

    Raises:
        RecipeError: a layer or a signal of another name, or a layer count that is not positive.
    """

    attention: Collection[str] = ()
    """Whose attention: of the ``"previous"`` layer, which has run, or of the ``"next"`` one. It is that of the stage's
    raters, so it implies `raters`."""
    raters: bool = False
    """The rater weights of the stage."""
    question: bool = False
    """Embeddings of the text tokens behind the first image (`Tokens.question`)."""
    question_states: bool = False
    """Hidden states of these text tokens at the place (`Tokens.question.states`): the question as far as the model has
    read it. Implies `question`."""
    embedding: bool = False
    """The vision tokens as they entered the language model (``tokens.signal("embedding")``)."""
    tower: Collection[str] = ()
    """Signals of the vision tower by name, out of `TOWER`, of a block where one is named (``tokens.signal(name)``)."""
    earlier: Collection[int] = ()
    """Hidden states that entered the layer so many layers before the place (``tokens.signal("earlier_1")``)."""
    grid: bool = False
    """Where the tokens lie on the pictures: `Tokens.cell` and `Tokens.grids`, and the grids that a scheduler is given.
    Not every prompt tells (half a picture, a tower that nobody knows): a recipe that does not ask runs all the same."""
    layer_keys: bool = False
    """Keys of the layer that has run, after the rotary embedding: ``tokens.signal("layer_keys")``, ``[B, N, Hkv, d]``;
    with `question`, those of the text tokens too (`Tokens.question.keys`)."""
    layer_queries: bool = False
    """Queries of the vision tokens in that layer: ``tokens.signal("layer_queries")``, ``[B, N, H, d]``."""
    glimpse: bool = False
    """Attention of a position behind the prompt that the part brings (`Tokens.glimpse`), in the layer that has run."""
    projector: bool = False
    """What makes a vision token of the tower's ``hidden`` signal (`Tokens.projector`), for parts that merge in front of
    it. Only after vision: further on, states are no longer what it gives."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", self.question or self.question_states)
        for field in ("attention", "tower", "earlier"):
            given = getattr(self, field)
            many: Iterable[object] = (given,) if isinstance(given, str | int | float) else given
            object.__setattr__(self, field, frozenset(many))
        for name in self.attention:
            if name not in LAYERS:
                hint = did_you_mean(name, LAYERS)
                raise RecipeError(f"Needs(attention={name!r}){hint}; expected one of: {', '.join(LAYERS)}")
        for name in self.tower:
            parse_tower_signal(name)
        layers: Collection[object] = self.earlier  # whatever was given
        if any(isinstance(back, bool) or not isinstance(back, int) or back < 1 for back in layers):
            raise RecipeError(f"Needs(earlier={list(self.earlier)}): expected numbers of layers, at least 1")

    def __or__(self, other: Needs) -> Needs:
        """What two parts read together."""
        return Needs(
            attention={*self.attention, *other.attention},
            raters=self.raters or other.raters,
            question=self.question or other.question,
            question_states=self.question_states or other.question_states,
            embedding=self.embedding or other.embedding,
            tower={*self.tower, *other.tower},
            earlier={*self.earlier, *other.earlier},
            grid=self.grid or other.grid,
            layer_keys=self.layer_keys or other.layer_keys,
            layer_queries=self.layer_queries or other.layer_queries,
            glimpse=self.glimpse or other.glimpse,
            projector=self.projector or other.projector,
        )

    @property
    def asks_raters(self) -> bool:
        """Whether the stage must have raters."""
        return self.raters or bool(self.attention)

    @property
    def depends_on_question(self) -> bool:
        """Whether what is read may differ between two questions about one picture."""
        return self.question or self.asks_raters or self.glimpse

    @property
    def projections(self) -> bool:
        """Whether queries or keys of the layer that has run are read as they are."""
        return self.layer_keys or self.layer_queries

    @property
    def signals(self) -> frozenset[str]:
        """Names under which `Tokens.signal` gives what is read."""
        flags = {"embedding": self.embedding, "layer_keys": self.layer_keys, "layer_queries": self.layer_queries}
        flagged = [name for name, asked in flags.items() if asked]
        return frozenset({*self.tower, *flagged, *(earlier_signal(back) for back in self.earlier)})


def earlier_signal(back: int) -> str:
    """Name of the signal that holds the hidden states which entered the layer `back` layers before the place."""
    return f"earlier_{back}"


def tower_signal(name: str, block: int | str | None = None) -> str:
    """Name of a signal of the vision tower: one of `TOWER`, of `block` (``5``, ``-2``, ``"1/4"``) where it is given."""
    return name if block is None else f"{name}@{block}"


def parse_tower_signal(name: str) -> tuple[str, int | Fraction | None]:
    """The signal and its block, from a name such as ``keys@5``; None where it names no block.

    Raises:
        RecipeError: no such signal, or a block that is no number and no share of the depth.
    """
    signal, at, block = name.partition("@")
    if signal not in TOWER:
        raise RecipeError(f"Needs(tower={name!r}){did_you_mean(signal, TOWER)}; expected one of: {', '.join(TOWER)}")
    try:
        return signal, block_at(block) if at else None
    except PlaceError as error:
        raise RecipeError(f"Needs(tower={name!r}): {error}") from None


def cannot_give(place: Place, reads: Needs) -> str | None:
    """What parts at `place` read that no model can give there, in words; None where nothing stands in the way."""
    if place.kind == "in_vision":
        wanted = {
            "the question": reads.question,
            "attention of the language model": bool(reads.attention),
            "raters": reads.raters,
            "the input embedding": reads.embedding,
            "hidden states of an earlier decoder layer": bool(reads.earlier),
            "queries and keys of a decoder layer": reads.projections,
            "a glimpse behind the prompt": reads.glimpse,
            "the projector": reads.projector,
        }
        found = [what for what, asked in wanted.items() if asked]
        return f"{' and '.join(found)}: the vision tower runs before the language model" if found else None
    if place.in_decoder and reads.projector:
        return "the projector: before a decoder layer, states are no longer what it gives"
    if place.kind == "after_vision" and reads.earlier:
        return "hidden states of an earlier decoder layer: none has run after vision"
    if place.kind == "after_vision" and reads.projections:
        return "queries and keys of a decoder layer: none has run after vision"
    if place.kind == "after_vision" and reads.glimpse:
        return "a glimpse behind the prompt, which runs through decoder layers: none has run after vision"
    return None
