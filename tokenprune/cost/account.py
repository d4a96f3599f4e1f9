"""`account`: the cost of a prompt layer by layer, untouched and with a recipe, in multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.budget import nominal_counts, plan
from tokenprune.core.grids import Grid
from tokenprune.cost.inside import Inside, inside_tower
from tokenprune.cost.prices import PromptPrices
from tokenprune.cost.shape import DecoderShape, ModelShape
from tokenprune.cost.stages import StageCost, stage_costs, steps_behind
from tokenprune.errors import InputError
from tokenprune.pipeline import Pipeline


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer in the prefill. Costs in multiply-adds."""

    layer: int
    vision: int
    """Vision tokens that enter it."""
    tokens: int
    """All tokens that enter it."""
    fed: int
    """Vision tokens that go through its MLP: fewer than enter it behind a stage with ``dropped: skip_ffn``."""
    linear: int
    """Projections and MLP."""
    attention: int
    """All pairs of tokens: the dense convention, of papers and counters."""
    causal: int
    """Pairs that a causal mask leaves: what a causal kernel computes. In no total."""
    cached: int
    """Tokens that its cache holds behind the prefill: those that entered, less what a later stage took out of it."""
    kv_bytes: int
    """Its cache behind the prefill."""

    @property
    def total(self) -> int:
        return self.linear + self.attention


@dataclass(frozen=True)
class Cost:
    """One side of the comparison, in multiply-adds."""

    rows: tuple[LayerCost, ...]
    stages: tuple[StageCost, ...]
    vision_tower: int
    projector: int
    lm_head: int
    """For the one token that the prefill predicts."""
    decode: int
    """All steps behind the prefill, lm_head included."""
    papers: int
    """View "vision tokens only", as papers count: decoder layers as if there were no text, without the method."""

    @property
    def decoder(self) -> int:
        """Decoder layers on the whole prompt."""
        return sum(row.total for row in self.rows)

    @property
    def method(self) -> int:
        """The recipe's own cost, as far as its parts state it."""
        return sum(stage.total for stage in self.stages)

    @property
    def unstated(self) -> tuple[str, ...]:
        """Parts that do not state what they cost; they are in no total."""
        return tuple(dict.fromkeys(part for stage in self.stages for part in stage.unstated))

    @property
    def prompt(self) -> int:
        """View "whole prompt": decoder layers and method."""
        return self.decoder + self.method

    @property
    def prefill(self) -> int:
        """From pixels to the first generated token: what the budget ``flops`` is a share of."""
        return self.vision_tower + self.projector + self.prompt + self.lm_head

    @property
    def end_to_end(self) -> int:
        """View "end to end": from pixels to the last generated token."""
        return self.prefill + self.decode

    @property
    def kv_bytes(self) -> int:
        """The cache of all layers behind the prefill."""
        return sum(row.kv_bytes for row in self.rows)


VIEWS = {"papers": "vision tokens only", "prompt": "whole prompt", "end_to_end": "end to end"}


@dataclass(frozen=True)
class Ledger:
    """What a recipe costs on a model, beside the untouched model."""

    model: str
    recipe: str
    total: int
    """Original vision tokens."""
    text: int
    """Other tokens of the prompt."""
    new_tokens: int
    """Tokens generated; the first comes out of the prefill."""
    exact: bool
    """Whether the counts are known; else they are what adaptive schedulers expect."""
    untouched: Cost
    reduced: Cost

    def share(self, view: str) -> float:
        """Reduced cost as a share of the untouched, in one of `VIEWS` or of any other number of `Cost`."""
        return float(getattr(self.reduced, view) / getattr(self.untouched, view))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        sides = {"untouched": _side(self.untouched), "reduced": _side(self.reduced)}
        head = {key: getattr(self, key) for key in ("model", "recipe", "total", "text", "new_tokens", "exact")}
        shares = {view: self.share(view) for view in VIEWS}
        return {**head, "unit": "multiply-adds", "unstated": list(self.reduced.unstated), "shares": shares, **sides}

    def __str__(self) -> str:
        about = "" if self.exact else "≈"
        lines = [f"{self.model}, {self.recipe}: {self.total} vision and {self.text} other tokens, multiply-adds"]
        for view, words in VIEWS.items():
            before, after = getattr(self.untouched, view), getattr(self.reduced, view)
            sizes = f"{readable(before):>9} → {about}{readable(after):>9}"
            lines.append(f"  {words:<18} {sizes}  {about}{self.share(view):.1%}")
        method = f"{readable(self.reduced.method)}, {self.reduced.method / self.untouched.decoder:.2%}"
        lines.append(f"  {'method alone':<18} {about}{method} of an untouched prefill")
        if self.reduced.unstated:
            lines.append(f"  not stated, in no total: {', '.join(self.reduced.unstated)}")
        kv = f"{self.untouched.kv_bytes / 2**20:.1f} → {about}{self.reduced.kv_bytes / 2**20:.1f} MiB"
        return "\n".join([*lines, f"  {'KV cache':<18} {kv}"])


def account(
    shape: ModelShape,
    pipeline: Pipeline,
    *,
    total: int,
    grids: Sequence[Grid],
    text: int,
    question: int | None = None,
    new_tokens: int = 1,
    kv_bytes: int = 2,
    matrices: int | None = None,
    kept: Sequence[int] | None = None,
) -> Ledger:
    """The ledger of `pipeline` on a model of this shape, for one prompt.

    Args:
        shape: the model.
        pipeline: the recipe's stages.
        total: vision tokens.
        grids: (T, H, W) of each image, in vision tokens.
        text: other tokens of the prompt.
        question: of these, the ones behind the first image: all that may rate. All of them when not given.
        new_tokens: tokens to generate, at least 1.
        kv_bytes: bytes of a number in the cache; 2 in half precision.
        matrices: MLP matrices in the view "vision tokens only"; the model's own when not given (FastV and FEATHER
            count 2 for a gated MLP, PyramidDrop 3).
        kept: how many tokens each stage kept, from a report: what adaptive schedulers really decided.

    Raises:
        InputError: a number out of range, or not one `kept` for each stage.
        RecipeError, BudgetError: the recipe does not fit the model's depth.
        UnsupportedModelError: a stage inside a vision tower that has no such block.
    """
    question = text if question is None else question
    for name, value, least in (("total", total, 1), ("text", text, 0), ("question", question, 0)):
        if value < least:
            raise InputError(f"ledger: {name} must be at least {least}, got {value}")
    if question > text:
        raise InputError(f"ledger: question ({question} tokens) is part of text ({text} tokens), it cannot be longer")
    if new_tokens < 1 or kv_bytes < 1:
        raise InputError(f"ledger: new_tokens and kv_bytes must be at least 1, got {new_tokens} and {kv_bytes}")
    if kept is not None and len(kept) != len(pipeline):
        raise InputError(f"ledger: kept has {len(kept)} counts for {len(pipeline)} stages")
    depth = shape.decoder.layers
    inside = inside_tower(shape.vision, pipeline, total, grids)
    stages, exact = _stages(shape, pipeline, inside, total, grids, text, question, kept)
    entering, fed = [total] * depth, [total] * depth
    for stage, spec in zip(stages, pipeline, strict=True):
        fed[stage.layer :] = [stage.tokens] * (depth - stage.layer)
        if not spec.skips:
            entering[stage.layer :] = fed[stage.layer :]
    stored = list(fed)
    for stage, spec in zip(stages, pipeline, strict=True):
        if spec.kv == "all_layers":
            stored[: stage.layer] = [stage.tokens] * stage.layer

    def cost(
        vision: Sequence[int], fed: Sequence[int], cached: Sequence[int], own: tuple[StageCost, ...], saved: int
    ) -> Cost:
        rows = tuple(
            _layer_cost(shape.decoder, layer, n, fed[layer], text, cached[layer] + text, kv_bytes)
            for layer, n in enumerate(vision)
        )
        return Cost(
            rows=rows,
            stages=own,
            vision_tower=shape.vision.tower(total, grids) - saved,
            projector=shape.vision.projection(total, grids),
            lm_head=shape.decoder.head,
            decode=_decode(shape.decoder, rows, new_tokens),
            papers=vision_only(shape.decoder, vision, matrices, fed=fed),
        )

    return Ledger(
        model=shape.name,
        recipe=pipeline.name,
        total=total,
        text=text,
        new_tokens=new_tokens,
        exact=exact,
        untouched=cost([total] * depth, [total] * depth, [total] * depth, (), 0),
        reduced=cost(entering, fed, stored, stages, inside.saved),
    )


def vision_only(
    decoder: DecoderShape,
    entering: Sequence[int],
    matrices: int | None = None,
    *,
    fed: Sequence[int] | None = None,
) -> int:
    """Decoder layers that so many vision tokens enter, as if there were no text: Σ n · linear + 2 n² D (papers).

    Args:
        decoder: of the model.
        entering: vision tokens of each layer.
        matrices: of the MLP; its own when left out.
        fed: of `entering`, those that go through the MLP; all of them when left out.
    """
    through = entering if fed is None else fed
    return sum(
        n * decoder.projections + k * decoder.feed_forward(matrices) + decoder.attention(n, n)
        for n, k in zip(entering, through, strict=True)
    )


def readable(number: float) -> str:
    """``2.14 T``, ``834 G``: four significant digits and a unit of thousand."""
    for unit in ("", " k", " M", " G"):
        if number < 999.95:  # what is above would read 1000
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} T" if number < 1000 else f"{number:.0f} T"


def _layer_cost(
    decoder: DecoderShape, layer: int, vision: int, fed: int, text: int, cached: int, kv_bytes: int
) -> LayerCost:
    tokens = vision + text
    return LayerCost(
        layer=layer,
        vision=vision,
        tokens=tokens,
        fed=fed,
        linear=tokens * decoder.projections + (fed + text) * decoder.feed_forward(),
        attention=decoder.attention(tokens, tokens),
        causal=decoder.causal(tokens),
        cached=cached,
        kv_bytes=kv_bytes * decoder.kv_numbers(cached),
    )


def _decode(decoder: DecoderShape, rows: Sequence[LayerCost], new_tokens: int) -> int:
    """Steps behind the prefill: step i sees what each layer's cache kept of the prompt, and i generated tokens."""
    steps = new_tokens - 1
    fixed = steps * (decoder.layers * decoder.linear() + decoder.head)
    seen = sum(steps * row.cached + steps * (steps + 1) // 2 for row in rows)
    return fixed + decoder.attention(1, seen)


def _stages(
    shape: ModelShape,
    pipeline: Pipeline,
    inside: Inside,
    total: int,
    grids: Sequence[Grid],
    text: int,
    question: int,
    measured: Sequence[int] | None,
) -> tuple[tuple[StageCost, ...], bool]:
    """What each stage keeps and costs, and whether that is certain."""
    depth = shape.decoder.layers
    steps = steps_behind(pipeline, depth, inside)
    prices = PromptPrices(shape, pipeline, total, grids, text, question)
    budget = None if inside.steps else pipeline.budget  # the tower has met it, picture by picture
    if pipeline.apart:
        planned = pipeline.plan(total, grids, depth)
    else:
        planned = plan(steps, budget, depth=depth, total=total, grids=grids, prices=prices)
    known = tuple(count for count in planned if count is not None)
    counts = known if measured is None else tuple(measured)
    if measured is None and len(known) < len(planned):
        counts = nominal_counts(steps, total=total, grids=grids)
    own = stage_costs(
        shape, pipeline, counts, total=total, grids=grids, text=text, question=question, plan=planned, inside=inside
    )
    exact = inside.exact and (measured is not None or len(known) == len(planned))
    return own, exact


def _side(cost: Cost) -> dict[str, Any]:
    names = ("vision_tower", "projector", "decoder", "method", "lm_head", "decode", *VIEWS, "kv_bytes")
    rows = [{**vars(row), "total": row.total} for row in cost.rows]
    stages = [{**vars(stage), "unstated": list(stage.unstated), "total": stage.total} for stage in cost.stages]
    return {**{name: getattr(cost, name) for name in names}, "layers": rows, "stages": stages}
