"""`Compiled`: the language model of an attached recipe under torch.compile, its stages in the same graph.

The text model is compiled, not the whole model: between tower and text model transformers reads counts of placeholders
on the host, and inside Qwen's towers the grids too (huggingface/transformers#45816), which breaks graphs. A tower of
fixed-size pictures is a graph of its own. Hooks of the base and the text model stay outside, so that all sizes are
Python numbers before the graph begins; hooks of the decoder layers, and the stages in them, are traced with the layers.

A static recipe: one graph for the prefill, one for a decode step on a static cache. An adaptive recipe reads its counts
between two layers, so there each layer of the prefill is a graph of its own, at lengths that are rounded up to buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from inspect import signature
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from tokenprune.core.report import Graphs
from tokenprune.engine.cache import allocate, cache_in, layer_of, virtualise
from tokenprune.engine.cache_layers import Slots
from tokenprune.engine.engine import Engine
from tokenprune.engine.traces import Handle, shadow
from tokenprune.errors import InputError, UnsupportedModelError, did_you_mean

BUCKETS = 16
"""Lengths at which an adaptive stage may leave a prompt: its exact count is padded to the next of them."""

RECORDED = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes that record CUDA graphs, and what they come to without. Decode steps are recorded: each is replayed for many
tokens. Recording a prefill would not pay, whose cache is at new addresses in each call, and a replay would overwrite
what the prefill before it has left behind: the slots of its cache, the report."""

SHAPES = 64
"""Shapes that may be compiled before `Compiled` gives up. torch.compile itself would at the ninth."""


class Compiled:
    """Runs the text model of `engine` compiled, and its vision tower if `Adapter.tower` gives one, until `unmount`.

    Args:
        engine: mounted before.
        graphs: counts what was compiled.
        options: keyword arguments for `torch.compile`, such as ``backend`` or ``mode``.

    Raises:
        InputError: an option that is decided here, or that torch.compile does not take.
    """

    def __init__(self, engine: Engine, graphs: Graphs, options: Mapping[str, Any]) -> None:
        _check(options)
        if engine.tower.stages is not None:
            raise UnsupportedModelError(
                "compile: stages inside the vision tower are not compiled yet; attach without compile"
            )
        for stage in engine.pipeline:
            if stage.reads.glimpse:
                raise UnsupportedModelError(
                    f"compile: {stage.name} ({stage.place}): a glimpse behind the prompt runs through layers a second "
                    "time, which is not supported in one graph; attach without compile"
                )
        if engine.feed_forwards.layers:
            raise UnsupportedModelError(
                "compile: a stage with dropped: skip_ffn is not compiled yet; attach without compile"
            )
        self.engine = engine
        self.graphs = graphs
        self._options = {**options, "fullgraph": True, "dynamic": False}
        self._once = _unrecorded(self._options)
        self._seen: set[Hashable] = set()
        self._text: Any = engine.anatomy.text
        # A tower that is read is hooked from inside, at what differs from call to call: it runs as it is.
        self._tower: Any = None if engine.tower.blocks_read else engine.anatomy.adapter.tower(engine.anatomy.base)
        self._handles: list[Handle] = []
        self._lock = RLock()
        """Held for one run of the text model or the tower. torch.compile's own state, the counts of graphs and the
        layers' `forward` are the process's, not a thread's; decode steps of other threads come in between."""
        self._single: list[tuple[Any, Any]] = []
        """Each decoder layer and its compiled forward."""

    def mount(self) -> None:
        """Let the text model run through `run`. An attribute of this one module stands before the class's forward."""
        self._plain = self._text.forward
        self._prefill = torch.compile(self._plain, **self._once)
        self._step = torch.compile(self._plain, **self._options)
        self._handles = [shadow(self._text, "forward", self._locked(self.run))]
        if self._tower is not None:
            self._seeing = torch.compile(self._tower.forward, **self._once)
            self._handles.append(shadow(self._tower, "forward", self._locked(self.see)))

    def unmount(self) -> None:
        """Put back what was there."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _locked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return run(*args, **kwargs)

        return locked

    def see(self, *args: Any, **kwargs: Any) -> Any:
        """The vision tower's forward."""
        maybe_install_capturing_hooks(self._tower)  # as its forward would, in the first call, under a lock: no graph
        described = _described({**kwargs, **{str(place): value for place, value in enumerate(args)}})
        return self._call(self._seeing, ("tower", *described), args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The text model's forward: compiled where that pays, else as it is."""
        engine, cache = self.engine, cache_in(kwargs)
        prefill = engine.prefill
        if prefill is None:
            # On a dynamic cache every step has a shape of its own.
            if engine.decoding and getattr(cache, "is_compileable", False):
                return self._call(self._step, ("decode", *_described(kwargs)), args, kwargs)
            return self._plain(*args, **kwargs)
        uses_cache = kwargs.get("use_cache")
        if cache is None and (self._text.config.use_cache if uses_cache is None else uses_cache):
            # The text model would make the same one, inside the graph: too late to prepare its layers.
            cache = kwargs[engine.anatomy.cache_name] = DynamicCache(config=self._text.config)
        if not engine.pipeline.static:
            return self._layer_by_layer(args, kwargs)
        for index, removed in enumerate(prefill.dropped(engine.pipeline, engine.depth)):
            self._prepare(cache, index, removed, kwargs["inputs_embeds"])
        return self._call(self._prefill, ("prefill", *_described(kwargs), *prefill.graph_key), args, kwargs)

    def _prepare(self, cache: Cache | None, index: int, removed: int, like: Tensor) -> None:
        """What a graph cannot do to the cache of layer `index`: swap its class, and allocate at a fixed address.

        transformers, too, allocates beforehand where it compiles a prefill (huggingface/transformers#46446).
        """
        store = layer_of(cache, index)
        if index >= self.engine.first:
            virtualise(store, self.engine.owner)
        attention: Any = self.engine.anatomy.layers[index].self_attn
        heads = self._text.config.num_key_value_heads
        allocate(store, removed, like.new_empty(like.shape[0], heads, 0, attention.head_dim))

    def _layer_by_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A prefill in which each layer is a graph: hooks run between them, and may look at the data."""
        layers = self.engine.anatomy.layers
        if [at for at, _ in self._single] != list(layers):
            self._single = [(layer, torch.compile(layer.forward, **self._once)) for layer in layers]
        handles = [shadow(layer, "forward", self._one_layer(index)) for index, layer in enumerate(layers)]
        try:
            return self._plain(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _one_layer(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._prepare(cache_in(kwargs), index, 0, hidden)
            signature = ("layer", index, tuple(hidden.shape), *_described(kwargs, index))
            return self._call(self._single[index][1], signature, args, kwargs)

        return forward

    def _call(self, compiled: Callable[..., Any], signature: tuple[Hashable, ...], args: Any, kwargs: Any) -> Any:
        module = self._tower if signature[0] == "tower" else self._text
        signature = (*signature, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        limit = SHAPES * self.engine.depth
        known = signature in self._seen
        before = _counted()
        try:
            # Counted by code, which layers share; at the default limit of 8 it raises (pytorch/pytorch#167504).
            with nullcontext() if known else dynamo.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
                return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise UnsupportedModelError(
                f"compile: more than {SHAPES} shapes of prompts; pad prompts and pictures to fewer, "
                "or attach without compile"
            ) from error
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedModelError(
                f"compile: torch.compile cannot trace {type(module).__name__} in one graph: {reason.strip()}; "
                "attach without compile"
            ) from error
        except RuntimeError as error:
            for stage in self.engine.pipeline:
                stage.explain(error)
            raise
        finally:
            self.graphs.note(*(after - b for after, b in zip(_counted(), before, strict=True)), known=known)
            self._seen.add(signature)


def _check(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for options that torch.compile would refuse: before anything is on the model."""
    fixed = sorted({"fullgraph", "dynamic", "model"} & set(options))
    if fixed:
        raise InputError(
            f"attach(compile={{{fixed[0]!r}: ...}}): graphs are always full and static here; "
            "expected options such as backend, mode or options of torch.compile"
        )
    known = sorted(set(signature(torch.compile).parameters) - {"fullgraph", "dynamic", "model"})
    for name in options:
        if name not in known:
            raise InputError(
                f"attach(compile={{{name!r}: ...}}): expected one of {', '.join(known)}{did_you_mean(name, known)}"
            )
    try:
        torch.compile(lambda: None, **options)
    except (RuntimeError, TypeError, ValueError) as error:  # an unknown backend, mode or entry of `options`
        # Its own text goes on with all the hundreds of entries that there are.
        told = str(error).splitlines()[0].partition(", known options are")[0]
        raise InputError(f"attach(compile={dict(options)!r}): {told}") from None


def _unrecorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of torch.compile that do the same without CUDA graphs."""
    once = dict(options)
    if once.get("mode") in RECORDED:
        once["mode"] = RECORDED[once["mode"]]
    if "triton.cudagraphs" in (once.get("options") or {}):
        once["options"] = {**once["options"], "triton.cudagraphs": False}
    return once


def _counted() -> tuple[int, int]:
    """Graphs compiled and broken so far in this process.

    Torch counts no recompiles (``counters["recompiles"]`` is always empty), and ``counters["frames"]`` also counts
    attempts that failed, so what was compiled for known shapes is told from graphs and signatures.
    """
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _described(kwargs: Mapping[str, Any], only: int | None = None) -> tuple[Hashable, ...]:
    """Shapes and types of all arguments, those of the cache's layers (of the one at `only`) included."""
    described: list[Hashable] = []
    for name, value in sorted(kwargs.items()):
        if isinstance(value, Cache):
            layers = value.layers if only is None else value.layers[only : only + 1]
            described += [_layer(layer) for layer in layers]
        elif isinstance(value, Tensor):
            described.append((name, tuple(value.shape), value.dtype))
        elif isinstance(value, list | tuple):
            described.append((name, tuple(tuple(x.shape) for x in value if isinstance(x, Tensor))))
        elif isinstance(value, Hashable):
            described.append((name, value))
    return tuple(described)


def _layer(layer: Any) -> Hashable:
    stored = tuple(layer.keys.shape) if layer.is_initialized else None
    slots: Slots | None = getattr(layer, "slots", None)
    kept = None
    if slots is not None:
        missing = tuple(x is None for x in (slots.valid, slots.shift, slots.bias))
        kept = tuple(slots.origin.shape), slots.tail, missing
    return type(layer), stored, getattr(layer, "max_cache_len", None), getattr(layer, "removed", 0), kept
