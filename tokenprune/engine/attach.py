"""`attach`: put a recipe on an unmodified Hugging Face vision-language model, and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import Prices
from tokenprune.core.grids import Grid
from tokenprune.core.report import Graphs, Report
from tokenprune.cost.prices import PromptPrices
from tokenprune.cost.shape import ModelShape
from tokenprune.engine.asked import answer, asked_of
from tokenprune.engine.batching import refuse_pictures
from tokenprune.engine.cache import cache_in
from tokenprune.engine.chunks import wait
from tokenprune.engine.compiled import BUCKETS, Compiled
from tokenprune.engine.engine import Engine
from tokenprune.engine.hooks import forget_compiled
from tokenprune.engine.parallel import check_parallel
from tokenprune.engine.traces import Handle, post_hook, pre_hook, shadow
from tokenprune.engine.weights import check_weights
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.adapter import Adapter
from tokenprune.families.anatomy import Anatomy, anatomy, pictures_in
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, load_recipe


class Attached:
    """A recipe on a model, until `detach` or the end of its ``with`` block. Made by `attach`."""

    def __init__(self, parts: Anatomy, recipe: Recipe | Pipeline, compile: Mapping[str, Any] | None = None) -> None:
        self.anatomy = parts
        """Where the model's parts are."""
        self.recipe = recipe
        prices = None
        if recipe.budget is not None and recipe.budget.kind == "flops":
            prices = partial(_prices, parts.adapter.shape(parts.model.config))
        stages = recipe.stages if isinstance(recipe, Pipeline) else recipe.build_stages()
        pipeline = Pipeline(
            stages,
            budget=recipe.budget,
            depth=len(parts.layers),
            name=recipe.name,
            prices=prices,
            pictures=recipe.pictures,
        )
        check_weights(pipeline, parts)
        check_parallel(parts.layers, parts.text.config, compiled=compile is not None)
        pipeline.to(next(parts.text.parameters()).device)
        self.report = Report(recipe.name, recipe.fingerprint, len(parts.layers), len(pipeline.stages))
        self.engine = Engine(parts, pipeline, self.report)
        """What runs the stages; `tokenprune.engine.packed` calls it layer by layer."""
        self._compiled: Compiled | None = None
        if compile is not None:
            self.report.graphs = Graphs()
            self.engine.buckets = BUCKETS
            self._compiled = Compiled(self.engine, self.report.graphs, compile)
        self._handles: list[Handle] = []

    def _mount(self) -> None:
        model: Any = self.anatomy.model
        self.engine.mount()
        if self._compiled is not None:
            self._compiled.mount()
        asking = pre_hook(model, self._ask, prepend=True)
        waiting = shadow(self.anatomy.text, "forward", self._or_wait(self.anatomy.text.forward))
        self._handles = [waiting, asking, post_hook(model, self._answer, always_call=True)]
        if hasattr(model, "generate"):
            # An instance attribute shadows the method: only generate() itself knows where the prompt ends.
            original = model.generate
            run = lambda *args, **kwargs: self._run_generate(original, args, kwargs)  # noqa: E731
            self._handles.append(shadow(model, "generate", run))
        if self.engine.pipeline.stages:
            self._handles += refuse_pictures(self.anatomy, self.report.recipe)

    def detach(self) -> None:
        """Take the recipe off: the model is bit-identical to one that never had it. Safe to call twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._compiled is not None:
            self._compiled.unmount()
        self.engine.unmount()
        forget_compiled()

    @contextmanager
    def vision_at(self, mask: Tensor) -> Iterator[None]:
        """Say where vision tokens stand in prompts that come as embeddings with the pictures merged in already.

            with attached.vision_at(mask):
                model.generate(inputs_embeds=embeddings)

        It holds for calls of this thread, of the model or of its language model alone, without `input_ids`.

        Args:
            mask: ``[B, L]`` bool, as long as the embeddings, True on vision tokens; without True for a prompt of text.
        """
        now = self.engine.now
        before, now.told = now.told, mask
        try:
            yield
        finally:
            now.told = before

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached to" if self._handles else "detached from"
        return f"<recipe {self.recipe.name!r} {state} {type(self.anatomy.model).__name__}>"

    def _ask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep back what the call asks of places in its prompt; `_answer` gives it."""
        self.engine.now.asked = None
        if not self.engine.pipeline.stages:
            return None
        self.engine.now.asked, kwargs = asked_of(model, kwargs)
        return None if self.engine.now.asked is None else (args, kwargs)

    def _answer(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        asked, self.engine.now.asked = self.engine.now.asked, None
        return None if asked is None or output is None else answer(asked, model, output)

    def _run_generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config = kwargs.get("generation_config") or self.anatomy.model.generation_config
        if self._compiled is not None:
            kwargs = _with_static_cache(config, kwargs)
        now = self.engine.now
        before = now.limit, now.pictures
        prompt = _prompt(args, kwargs)
        length = _prompt_length(prompt, kwargs)
        chunked = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None
        waits = chunked and length is not None and self.engine.pipeline.stages and self._shows(prompt)
        now.limit = length
        now.pictures = pictures_in(self.anatomy.adapter, kwargs)
        try:
            asked = self.engine.tower.generating(len(prompt[0]) if prompt else None, kwargs)
            with asked, self._waiting() if waits else nullcontext():
                return original(*args, **kwargs)
        finally:
            now.limit, now.pictures = before

    def _shows(self, prompt: Sequence[torch.Tensor]) -> bool:
        """Whether a prompt of ids ``[B, L]`` or embeddings ``[B, L, D]`` has vision tokens."""
        for given in prompt:
            ids = given if given.dim() == 2 else None
            if bool(self.anatomy.vision_mask(ids, given).any()):
                return True
        return False

    @contextmanager
    def prompt(self, length: int) -> Iterator[None]:
        """Take a prompt in several forwards on one cache: its stages wait until its last token is in.

        The forwards before return no logits, as the language model runs when the prompt is whole; the last one gives
        what a forward of the whole prompt gives.

            with tp.attach(model, "fastv") as attached:
                with attached.prompt(ids.shape[1]):
                    model(input_ids=ids[:, :700], pixel_values=pixels, cache=cache)
                    model(input_ids=ids[:, 700:], attention_mask=mask, cache=cache)

        Args:
            length: tokens of the prompt, those that the cache held before included.
        """
        now = self.engine.now
        before, now.limit = now.limit, length
        now.tower.clear()
        try:
            with self._waiting() if self.engine.pipeline.stages else nullcontext():
                yield
        finally:
            now.limit = before

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Let chunks of this thread's prompt wait for its last token (engine/chunks.py)."""
        now = self.engine.now
        before, now.chunked = now.chunked, True
        try:
            yield
        finally:
            now.chunked = before

    def _or_wait(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The text model's `forward`, which does not run for a chunk that waits."""
        engine = self.engine

        def forward_or_wait(*args: Any, **kwargs: Any) -> Any:
            waiting = engine.now.waiting
            return forward(*args, **kwargs) if waiting is None else wait(self.anatomy, waiting)

        return forward_or_wait


def attach(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe | Pipeline,
    *,
    keep: float | None = None,
    average: float | None = None,
    final: float | None = None,
    flops: float | None = None,
    compile: bool | Mapping[str, Any] = False,
    adapter: Adapter | None = None,
) -> Attached:
    """Attach a recipe to a Hugging Face vision-language model.

    Use it as a context manager, or keep the result and call `detach` on it. While it is attached, `model(...)` and
    `model.generate(...)` run with fewer vision tokens; prompts without vision tokens pass through untouched.

    Args:
        model: a supported model (docs/models.md); its weights and class stay as they are.
        recipe: a recipe's name, path, dict or `Recipe`; or a `Pipeline` of stages made in Python, as they are.
        keep: budget that replaces the recipe's: vision tokens per layer from the recipe's first place on, a share
            (float) or a count (int) of each sample's original ones.
        average: the same, averaged over all layers.
        final: the same, after the last stage.
        flops: budget that replaces the recipe's: a share of the multiply-adds of the untouched prefill, from the pixels
            to the first token, the recipe's own included. It is solved for each sample when its prompt comes.
        compile: run the language model under torch.compile, stages included, and a vision tower of fixed-size pictures
            (docs/compile.md); a mapping is passed on, such as ``{"mode": "reduce-overhead"}``. `generate` then takes a
            static cache, unless it is told otherwise.
        adapter: of a family of your own (docs/your-own-family.md); by default that of the model's `model_type`.

    Raises:
        InputError: an option of torch.compile that is decided here, or that it does not take; a second budget for a
            `Pipeline`.
        RecipeError: the recipe is not valid, or does not fit the model's depth.
        BudgetError: the budget is out of range.
        UnsupportedModelError: no adapter knows the model, `adapter` is not one for it, a recipe is attached to it
            already, or `flops` is asked of a model whose shape the ledger does not know.
    """
    if isinstance(recipe, Pipeline):
        _refuse_budget(keep=keep, average=average, final=final, flops=flops)
        loaded: Recipe | Pipeline = recipe
    else:
        loaded = load_recipe(recipe, keep=keep, average=average, final=final, flops=flops)
    parts = anatomy(model, adapter)
    for hook in parts.text._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Engine):
            raise UnsupportedModelError(
                f"attach: recipe {hook.__self__.report.recipe!r} is attached to this model already; detach it first"
            )
    options = compile if isinstance(compile, Mapping) else {} if compile else None
    attached = Attached(parts, loaded, options)
    forget_compiled()
    attached._mount()
    return attached


def _refuse_budget(**given: float | None) -> None:
    for kind, value in given.items():
        if value is not None:
            raise InputError(
                f"attach(pipeline, {kind}={value}): a Pipeline has the budget that it was made with; "
                f"make it with budget=Budget({kind!r}, {value})"
            )


def _with_static_cache(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` under compile: one step after the other in buffers of one size, hence in one graph."""
    # transformers would compile the whole model around ours, which breaks graphs.
    kwargs = {"disable_compile": True, **kwargs}
    asked = ("cache_implementation", "use_cache", "prompt_lookup_num_tokens", "assistant_model")
    given = [cache_in(kwargs)] + [kwargs.get(key, getattr(config, key, None)) for key in asked]
    if any(value not in (None, True) for value in given):
        return kwargs
    return {**kwargs, "cache_implementation": "static"}


def _prices(
    shape: ModelShape, pipeline: Pipeline, total: int, grids: Sequence[Grid], text: int, question: int
) -> Prices:
    return PromptPrices(shape, pipeline, total, grids, text, question)


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The ids ``[B, L]`` and embeddings ``[B, L, D]`` that a generate() call was given."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds"), args[0] if args else None]
    return [x for x in given if isinstance(x, torch.Tensor) and x.dim() >= 2]


def _prompt_length(prompt: Sequence[torch.Tensor], kwargs: dict[str, Any]) -> int | None:
    """Tokens of a generate() call's prompt, those already in the cache included; None when it cannot be told."""
    lengths = [x.shape[1] for x in prompt]
    if not lengths:
        return None
    mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        lengths.append(mask.shape[1])
    past = 0 if cache is None else int(cache.get_seq_length())
    longest = max(lengths)
    return longest if longest > past else past + longest
