"""The sides of a comparison: one model, several recipes attached at once, the same weights and attention kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from tokenprune.engine.attach import Attached, attach
from tokenprune.errors import InputError
from tokenprune.families.noise import Pictures, any_resolution, noise, smaller_picture
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.study.bench.clock import Sample, VisionClock, timed

Compile = bool | Mapping[str, Any]
"""As in `attach`."""

UNTOUCHED = "untouched"
SMALLER = "smaller image"
BASELINES = ("random", "uniform")


@dataclass
class Side:
    """One way to run the model. Made by `open_side`."""

    name: str
    model: Any
    """Its own modules, on the same weights as all other sides."""
    pictures: Pictures
    vision: VisionClock
    recipe: Recipe | None = None
    attached: Attached | None = None

    def prompt(self, *, text: int, batch: int) -> dict[str, Tensor]:
        """Inputs of this side: words and pixels are the same on all sides; only a smaller image has its own pixels."""
        return noise(self.model, self.pictures, text=text, batch=batch)

    def run(self, inputs: dict[str, Tensor], new_tokens: int) -> Sample:
        """One timed run."""
        report = None if self.attached is None else self.attached.report
        return timed(self.model, inputs, new_tokens, vision=self.vision, report=report)

    def tokens_per_layer(self) -> list[float]:
        """Vision tokens that entered each layer in the last run, mean over the batch."""
        if self.attached is None:
            return [float(self.pictures.tokens)] * int(self.model.config.get_text_config().num_hidden_layers)
        return _means(self.attached.report.vision_tokens)


def open_side(
    stack: ExitStack,
    name: str,
    model: Any,
    pictures: Pictures,
    recipe: Recipe | None = None,
    *,
    compile: Compile = False,
) -> Side:
    """A side that stays ready until `stack` closes.

    Compiled, a side without a recipe runs under the recipe `none`, so that all sides are compiled in the same way.

    Raises:
        UnsupportedModelError: the model carries a recipe already.
    """
    twin = _twin(model)
    if compile and recipe is None:
        recipe = load_recipe("none")
    options: dict[str, Any] = {"compile": compile} if compile else {}
    attached = None if recipe is None else stack.enter_context(attach(twin, recipe, **options))
    return Side(name, twin, pictures, stack.enter_context(VisionClock(twin)), recipe, attached)


@contextmanager
def sides(
    model: Any, recipe: Recipe, pictures: Pictures, *, text: int, baselines: bool = True, compile: Compile = False
) -> Iterator[Sequence[Side]]:
    """The untouched model, the recipe, and beside it random and uniform choice and a smaller image at equal tokens.

    Equal: as many vision tokens in a layer, on average over the layers, as the recipe had in a first run; rounded down.
    Behind a stage with ``dropped: skip_ffn`` those that go through feed-forwards count: attention sees all the others.

    Raises:
        InputError: sides run different attention kernels; or as `noise` does.
        UnsupportedModelError: the model carries a recipe already.
    """
    with ExitStack() as stack:
        untouched = open_side(stack, UNTOUCHED, model, pictures, compile=compile)
        made = [untouched, open_side(stack, recipe.name, model, pictures, recipe, compile=compile)]
        if baselines:
            made[1].run(made[1].prompt(text=text, batch=1), 1)
            assert made[1].attached is not None
            layers = _means(made[1].attached.report.feed_forward_tokens)
            equal = max(1, int(sum(layers) / len(layers)))
            others = [name for name in BASELINES if name != recipe.name]
            for name, other in ((name, load_recipe(name, average=equal)) for name in others):
                made.append(open_side(stack, name, model, pictures, other, compile=compile))
            small = open_side(stack, SMALLER, model, smaller_picture(model.config, equal), compile=compile)
            stack.enter_context(any_resolution(small.model))
            made.append(small)
        check_kernels(made, model)
        yield made


def _means(counts: Tensor) -> list[float]:
    """Of ``[B, layers]`` tokens, the mean over the batch at each layer."""
    return [float(n) for n in counts.double().mean(0)]


def check_kernels(made: Sequence[Side], model: Any) -> None:
    """Raise `InputError` unless all sides run the attention kernel of `model`."""
    kernel = _attention(model)
    different = {_attention(side.model) for side in made} - {kernel}
    if different:
        raise InputError(f"bench: sides run different attention kernels: {kernel} and {', '.join(different)}")


def _twin(model: Any) -> Any:
    """The same model in modules of its own: hooks on one are no hooks on the other, weights are there once."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _attention(model: Any) -> str:
    return str(model.config.get_text_config()._attn_implementation)
