"""`Needs`: what a part reads beside the tokens at its place, declared so that the engine records it and no more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tokenprune.core.place import Place
from tokenprune.errors import RecipeError, did_you_mean

LAYERS = ("previous", "next")
TOWER = ("class_attention", "received_attention", "keys")
"""Signals that a vision tower may give, one row for each vision token: the class token's attention to it, the attention
that it receives on average, and its key."""


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
    """Signals of the vision tower by name, out of `TOWER` (``tokens.signal(name)``)."""
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", self.question or self.question_states)
        for field in ("attention", "tower", "earlier"):
            given = getattr(self, field)
            many: Iterable[object] = (given,) if isinstance(given, str | int | float) else given
            object.__setattr__(self, field, frozenset(many))
        for field, known in (("attention", LAYERS), ("tower", TOWER)):
            for name in getattr(self, field):
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise RecipeError(f"Needs({field}={name!r}){hint}; expected one of: {', '.join(known)}")
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
        )

    @property
    def asks_raters(self) -> bool:
        """Whether the stage must have raters."""
        return self.raters or bool(self.attention)

    @property
    def depends_on_question(self) -> bool:
        """Whether what is read may differ between two questions about one picture."""
        return self.question or self.asks_raters

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
        }
        found = [what for what, asked in wanted.items() if asked]
        return f"{' and '.join(found)}: the vision tower runs before the language model" if found else None
    if place.kind == "after_vision" and reads.earlier:
        return "hidden states of an earlier decoder layer: none has run after vision"
    if place.kind == "after_vision" and reads.projections:
        return "queries and keys of a decoder layer: none has run after vision"
    return None
