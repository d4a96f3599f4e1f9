"""The sides of a comparison: one model, several recipes attached at once, the same weights and attention kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from tokenprune.bench.clock import Sample, timed
from tokenprune.errors import InputError
from tokenprune.models.attach import Attached, attach
from tokenprune.models.noise import LLAVA, Pictures, any_resolution, noise, smaller_picture
from tokenprune.recipe import Recipe, load_recipe

UNTOUCHED = "untouched"
SMALLER = "smaller image"
BASELINES = ("random", "uniform")


@dataclass
class Side:
    """One way to run the model."""

    name: str
    model: Any
    """Its own modules, on the same weights as all other sides."""
    pictures: Pictures
    recipe: Recipe | None = None
    attached: Attached | None = None

    def prompt(self, *, text: int, batch: int) -> dict[str, Tensor]:
        """Its inputs: words and pixels are those of the other sides, but for a smaller image."""
        return noise(self.model, self.pictures, text=text, batch=batch)

    def run(self, inputs: dict[str, Tensor], new_tokens: int) -> Sample:
        """One timed run."""
        return timed(self.model, inputs, new_tokens, None if self.attached is None else self.attached.report)

    def tokens_per_layer(self, layers: int) -> list[float]:
        """Vision tokens that entered each layer in the last run, mean over the batch."""
        if self.attached is None:
            return [float(self.pictures.tokens)] * layers
        mean: Tensor = self.attached.report.vision_tokens.double().mean(0)
        return [float(n) for n in mean]


@contextmanager
def sides(
    model: Any, recipe: Recipe, pictures: Pictures, *, text: int, baselines: bool = True, compile: bool = False
) -> Iterator[Sequence[Side]]:
    """The untouched model, the recipe, and beside it random and uniform choice and a smaller image at equal tokens.

    Equal: as many vision tokens in a layer, on average over the layers, as the recipe had in a first run; rounded down.

    Compiled, the untouched model runs under the recipe `none`, so that both sides are compiled in the same way. A LLaVA
    has no smaller image then: its recipes know pictures of one size.

    Raises:
        InputError: sides run different attention kernels; or as `noise` does.
        UnsupportedModelError: the model carries a recipe already.
    """
    attention = _attention(model)
    nothing = load_recipe("none") if compile else None
    with ExitStack() as stack:

        def side(name: str, pictures: Pictures, recipe: Recipe | None) -> Side:
            twin = _twin(model)
            options: dict[str, Any] = {"compile": True} if compile else {}
            attached = None if recipe is None else stack.enter_context(attach(twin, recipe, **options))
            return Side(name, twin, pictures, recipe, attached)

        made = [side(UNTOUCHED, pictures, nothing), side(recipe.name, pictures, recipe)]
        if baselines:
            equal = _average(made[1], text)
            others = [name for name in BASELINES if name != recipe.name]
            made += [side(name, pictures, load_recipe(name, average=equal)) for name in others]
            if not (compile and model.config.model_type == LLAVA):
                made.append(side(SMALLER, smaller_picture(model.config, equal), nothing))
                stack.enter_context(any_resolution(made[-1].model))
        different = {_attention(side.model) for side in made} - {attention}
        if different:
            raise InputError(f"bench: sides run different attention kernels: {attention} and {', '.join(different)}")
        yield made


def _average(side: Side, text: int) -> int:
    """Vision tokens in a layer, mean over the layers of a first run, rounded down."""
    side.run(side.prompt(text=text, batch=1), 1)
    layers = side.tokens_per_layer(int(side.model.config.get_text_config().num_hidden_layers))
    return max(1, int(sum(layers) / len(layers)))


def _twin(model: Any) -> Any:
    """The same model in modules of its own: hooks on one are no hooks on the other, weights are there once."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _attention(model: Any) -> str:
    return str(model.config.get_text_config()._attn_implementation)
