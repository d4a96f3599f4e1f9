"""The hooks that run a recipe's stages inside an unmodified model, and shorten its sequence from each stage's layer on.

A hook on the base model sees the prompt, one on the text model opens the state of the forward, one on each decoder
layer runs the stages of that layer and hands it the shorter sequence. Nothing of transformers is replaced; see
docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenprune.core.report import Report, StageReport, Stopwatch
from tokenprune.engine.cache import cache_in, check_cache, different_slots, layer_of, slots_of, virtualise
from tokenprune.engine.deepstack import survivors_only
from tokenprune.engine.forward import Forward
from tokenprune.engine.hooks import LayerHooks
from tokenprune.engine.prefill import Prefill, planned
from tokenprune.engine.prompt import position_ids, real_tokens, start_reading, vision_tokens
from tokenprune.engine.taps import Taps
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.adapter import Anatomy, picture_size
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage


class Engine:
    """Runs `pipeline` inside the model of `anatomy`; `mount` adds the hooks, `unmount` removes every trace.

    Args:
        anatomy: the model's modules.
        pipeline: stages and budget.
        report: filled as the stages run.
    """

    def __init__(self, anatomy: Anatomy, pipeline: Pipeline, report: Report) -> None:
        self.anatomy = anatomy
        self.pipeline = pipeline
        self.report = report
        self.depth = len(anatomy.layers)
        self.layers = pipeline.layers(self.depth)
        self.first = min(self.layers, default=self.depth)
        """The first layer that may see fewer tokens."""
        self.buckets: int | None = None
        """Lengths at which a prompt may leave an adaptive stage; None: any."""
        self.limit: int | None = None
        """Length of the prompt of the running `generate` call: nothing behind it may rate."""
        self.pixels: tuple[int, int] | None = None
        """Height and width of its pictures: `generate` may run the tower by itself, and give the base model none."""
        self.taps = Taps(anatomy, pipeline)
        self._handles: list[Any] = []
        indices = [i for i in range(self.depth) if i >= self.first or i in self.taps.before]
        self._layer_hooks = LayerHooks(
            anatomy.layers, {index: self._layer_hook(index) for index in indices}, self.taps.mount
        )
        # Where layers have masks of several kinds, the first one's does not tell of the others'.
        self._alike = len(set(getattr(anatomy.text.config, "layer_types", None) or ())) < 2
        self._input_ids: Tensor | None = None
        self._attention_mask: Any = None
        self._vision: Tensor | None = None
        self._pixels: tuple[int, int] | None = None
        self._forward: Forward | None = None
        self._prefill: Prefill | None = None
        self._unopened: Callable[[], Prefill | None] | None = None
        self._ran: list[StageReport] | None = None

    # ---------------------------------------------------------------- mounting

    def mount(self) -> None:
        """Add the hooks."""
        anatomy = self.anatomy
        self._handles = [
            anatomy.base.register_forward_pre_hook(self._enter_base, with_kwargs=True),
            anatomy.text.register_forward_pre_hook(self._enter_text, with_kwargs=True),
            anatomy.text.register_forward_hook(self._leave_text, always_call=True),
        ]
        first: Any = anatomy.layers[0]
        self._handles.append(first.register_forward_pre_hook(self._enter_layers, with_kwargs=True, prepend=True))
        self._layer_hooks.mount()
        if anatomy.adapter.deepstack is not None:
            original = getattr(anatomy.text, anatomy.adapter.deepstack)
            added = survivors_only(original, lambda: self._forward)
            setattr(anatomy.text, anatomy.adapter.deepstack, added)

    def unmount(self) -> None:
        """Remove the hooks, and the state of any forward that did not end."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layer_hooks.unmount()
        if self.anatomy.adapter.deepstack is not None:
            self.anatomy.text.__dict__.pop(self.anatomy.adapter.deepstack, None)
        self._close()

    # ---------------------------------------------------------------- base model and text model

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._close()
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._input_ids = input_ids
        self._attention_mask = kwargs.get("attention_mask")
        self._pixels = picture_size(kwargs.get("pixel_values")) or self.pixels
        embeddings = kwargs.get("inputs_embeds")
        if input_ids is None and embeddings is not None:
            self._vision = self.anatomy.vision_mask(None, embeddings)

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        cache = cache_in(kwargs)
        if embeddings is None:
            if self._input_ids is not None:
                raise UnsupportedModelError(
                    "the language model was called without inputs_embeds: vision tokens cannot be located"
                )
            return
        batch, length = embeddings.shape[:2]
        static = bool(getattr(cache, "is_compileable", False))
        decoding = length == 1 and cache is not None
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) and not (static and decoding) else 0
        slots = different_slots(cache)
        config = self.anatomy.text.config
        forward = self._forward = Forward(
            batch=batch,
            length=length,
            past=past,
            static=static,
            positions=position_ids(kwargs.get("position_ids"), past, length, embeddings.device),
            rotary=self.anatomy.text.rotary_emb,
            flash="flash" in str(getattr(config, "_attn_implementation", "")),
            shifts=[each.shift for each in slots if each.shift is not None],
        )
        if not decoding:
            self._unopened = self._start_prefill(embeddings, forward, cache)
        clean = all(each.valid is each.shift is None for each in slots)
        forward.untouched = self._unopened is None and not static and self._alike and clean
        if not forward.untouched:
            self._layer_hooks.mount()

    @property
    def prefilling(self) -> bool:
        """Whether the forward that has begun brings vision tokens."""
        return self._opened() is not None

    @property
    def decoding(self) -> bool:
        """Whether it is one more token on a cache."""
        return self._forward is not None and self._forward.length == 1 and self._opened() is None

    def settled(self) -> tuple[Hashable, ...]:
        """What a graph of the prefill takes for granted beside shapes: tokens that each stage keeps of each sample
        (None where the scores will decide), its text tokens that may rate, where there is padding, and whether
        positions count up."""
        prefill = self._opened()
        if prefill is None:
            return ()
        prompt = prefill.prompt
        return prefill.counts, prompt.text.shape[1], prompt.tokens.text_padded, prompt.real is None, prompt.counts_up

    def dropped(self) -> list[int]:
        """By how many tokens the sequence is shorter at each layer of a prefill whose counts are all known."""
        prefill = self._opened()
        assert prefill is not None and self.pipeline.static
        return prefill.dropped(self.pipeline, self.depth)

    def _opened(self) -> Prefill | None:
        """The prefill, None without vision tokens. Located when it is first asked for: layers that do not need to know
        are on the device by then, and keep it busy meanwhile."""
        if self._unopened is not None:
            opening, self._unopened = self._unopened, None
            self._prefill = opening()
        return self._prefill

    def _start_prefill(self, embeddings: Tensor, forward: Forward, cache: Any) -> Callable[[], Prefill | None] | None:
        if self._vision is None and self._input_ids is None:
            return None
        read = start_reading(
            self.anatomy,
            vision=vision_tokens(self.anatomy, self._input_ids, embeddings) if self._vision is None else self._vision,
            real=real_tokens(self._attention_mask, forward.batch, forward.length, embeddings.device, forward.past),
            embeddings=embeddings,
            positions=forward.positions,
            pixels=self._pixels,
            limit=forward.length if self.limit is None else max(1, self.limit - forward.past),
            rated=any(stage.raters is not None for stage in self.pipeline),
        )

        def opening() -> Prefill | None:
            prompt = read()
            if prompt is None:
                return None
            check_cache(cache)
            self._ran = []
            total = prompt.tokens.total
            prefill = planned(prompt, self.pipeline, self.depth, forward.length)
            self.report.begin(total, prompt.tokens.grids)
            if self.buckets is not None and not self.pipeline.static:
                forward.bucket = -(-max(total) // self.buckets)
            return prefill

        return opening

    def _leave_text(self, module: nn.Module, args: Any, output: Any) -> None:
        try:
            # `output` is None when the forward raised: its own error is the one to show.
            if output is not None:
                self._opened()  # if no layer has, no stage has run
                if self._ran is not None:
                    self.report.finish(self._ran)
        finally:
            self._close()

    def _close(self) -> None:
        self._input_ids = self._attention_mask = self._vision = self._pixels = None
        self._forward = self._prefill = self._unopened = self._ran = None
        self.taps.inputs.clear()

    # ---------------------------------------------------------------- forwards in parts (engine/packed/generate.py)

    def announce(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Say what the base model would have been called with, ``[B, L]`` both: the next forward is the text model's
        own."""
        self._enter_base(self.anatomy.base, (), {"input_ids": input_ids, "attention_mask": attention_mask})

    @contextmanager
    def opened(
        self, input_ids: Tensor, attention_mask: Tensor, embeddings: Tensor, positions: Tensor, cache: Any
    ) -> Iterator[None]:
        """A prefill whose layers the caller calls one by one; the layers below may have run elsewhere.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]``, 0 on padding.
            embeddings: ``[B, L, D]`` that entered layer 0.
            positions: ``[B, L]`` position ids.
            cache: empty, for the layers that are called inside.
        """
        self.announce(input_ids, attention_mask)
        call = {"inputs_embeds": embeddings, "position_ids": positions, "cache": cache}
        output = None
        try:
            self._enter_text(self.anatomy.text, (), call)
            yield
            output = embeddings
        finally:
            self._leave_text(self.anatomy.text, (), output)

    def entered(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Say what entered layer `index`, ``[B, L, D]`` with its arguments, where that layer ran elsewhere."""
        forward, prefill = self._forward, self._opened()
        if forward is not None and prefill is not None:
            self.taps.entering(index, kwargs, forward, None, prefill.prompt.tokens, prefill.text, hidden=hidden)

    # ---------------------------------------------------------------- decoder layers

    def _enter_layers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first layer's hook: the first to see the mask that the text model has made."""
        forward, hook = self._forward, self._layer_hooks.hooks.get(0)
        if forward is None:
            return None
        if forward.untouched:
            if kwargs.get("attention_mask") is None:
                self._layer_hooks.unmount()
                return None
            self._layer_hooks.mount()
        return None if hook is None else hook(layer, args, kwargs)

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        stages = [i for i, layer in enumerate(self.layers) if layer == index]
        first = self.first

        def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            forward = self._forward
            if forward is None:
                return None
            store = layer_of(cache_in(kwargs), index)
            prefill = self._opened()
            if prefill is None:
                return args, forward.adjust(kwargs, store)
            hidden = args[0] if args else kwargs["hidden_states"]
            if index >= first:
                virtualise(store)
            adjusted = forward.adjust(kwargs, store)
            for number in stages:
                hidden = self._run(number, index, hidden, adjusted, store)
                adjusted = forward.adjust(kwargs, store)
            prompt = prefill.prompt
            self.taps.entering(index, adjusted, forward, store, prompt.tokens, prefill.text)
            if index >= first:
                forward.store(store)
            if index == self.depth - 1:
                self._prefill = None
            if args:
                return (hidden, *args[1:]), adjusted
            return args, {**adjusted, "hidden_states": hidden}

        return before_layer

    def _run(self, number: int, index: int, hidden: Tensor, kwargs: dict[str, Any], store: Any | None) -> Tensor:
        """Run stage `number` before layer `index`; returns the hidden states of what is left."""
        forward, prefill = self._forward, self._prefill
        assert forward is not None and prefill is not None and self._ran is not None
        stage: Stage = self.pipeline.stages[number]
        # One graph has no clock inside.
        watch = None if torch.compiler.is_compiling() else Stopwatch(hidden.device.type == "cuda")
        with nullcontext() if watch is None else watch.measure():
            prompt = prefill.prompt
            tokens = prompt.tokens
            attention = self.taps.attention(stage, index, hidden, kwargs, forward, store, tokens, prefill.text)
            before = tokens.at_place(hidden, attention)
            result = prefill.run(number, stage, before)
            if result.tokens.sizes != before.sizes or result.merged.shape[1]:
                hidden, tokens, moved = forward.keep(
                    before, result, hidden, prefill.lengths, renumber=stage.positions == "renumber"
                )
                prefill.text = moved.gather(1, prefill.text)
            else:
                tokens = result.tokens
            if stage.positions == "renumber":
                forward.renumber(prompt, hidden, slots_of(store))
            prefill.prompt = replace(prompt, tokens=replace(tokens, attention=None))
        self._ran.append(
            StageReport(
                name=stage.name,
                place=str(stage.place),
                layer=None if stage.place.at is None else index,
                kept=result.kept,
                merged=result.merged,
                sizes=tokens.sizes,
                scores=result.scores,
                scored=before.origin,
                watch=watch,
            )
        )
        return hidden
