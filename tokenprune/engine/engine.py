"""The hooks that run a recipe's stages inside an unmodified model, and shorten its sequence from each stage's layer on.

A hook on the base model sees the prompt, one on the text model opens the state of the forward, one on each decoder
layer runs the stages of that layer and hands it the shorter sequence. Nothing of transformers is replaced; see
docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenprune.core.report import Report, StageReport
from tokenprune.engine.asked import Asked, with_hidden
from tokenprune.engine.cache import cache_in, check_cache, different_slots, held_in, layer_of, virtualise
from tokenprune.engine.chunks import Chunk, joined
from tokenprune.engine.deepstack import survivors_only
from tokenprune.engine.forward import Forward
from tokenprune.engine.hooks import LayerHooks
from tokenprune.engine.prompt import Prefill, planned
from tokenprune.engine.reading import position_ids, real_tokens, start_reading, vision_tokens
from tokenprune.engine.running import run_stage
from tokenprune.engine.taps import LayerCall, Taps
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import Anatomy, Pictures, pictures_in
from tokenprune.pipeline import Pipeline


class Engine:
    """Runs `pipeline` inside the model of `anatomy`; `mount` adds the hooks, `unmount` removes every trace.

        begin (base model) ─▶ begin (text model) ─▶ layer by layer: prefill ─▶ stages ─▶ layer ─▶ end (text model)

    A forward begins when the base model is called with its ids. The text model's call opens the state of the forward;
    if it brings vision tokens it is a prefill, which is located when the first layer asks for it.

    Args:
        anatomy: the model's modules.
        pipeline: stages and budget.
        report: filled as the stages run.

    Raises:
        UnsupportedModelError: a stage acts or reads where this model gives nothing.
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
        self.pictures = Pictures()
        """What it was told of its pictures: `generate` may run the tower by itself, and give the base model none."""
        _refuse_places(anatomy, pipeline)
        self.taps = Taps(anatomy, pipeline)
        self._handles: list[Any] = []
        indices = [i for i in range(self.depth) if i >= self.first or i in self.taps.layers_read]
        self._layer_hooks = LayerHooks(
            anatomy.layers, {index: self._layer_hook(index) for index in indices}, self.taps.mount
        )
        # Only if all layers are of one type does the first layer's mask tell what the others get.
        self._alike = len(set(getattr(anatomy.text.config, "layer_types", None) or ())) < 2
        self._input_ids: Tensor | None = None
        self._attention_mask: Any = None
        self._vision: Tensor | None = None
        self._pictures = Pictures()
        self.chunked = False
        """Whether that prompt comes in several forwards: none but the last reaches its length."""
        self.waiting: Chunk | None = None
        """The chunk that the text model was called with, and is not to run."""
        self.asked: Asked | None = None
        """What the running call of the model asks of places in its prompt."""
        self._forward: Forward | None = None
        self._prefill: Prefill | None = None
        self._locate: Callable[[], Prefill | None] | None = None
        self._ran: list[StageReport] | None = None

    # ---------------------------------------------------------------- mounting

    def mount(self) -> None:
        """Add the hooks."""
        anatomy = self.anatomy
        self._handles = [
            anatomy.base.register_forward_pre_hook(self._begin_base, with_kwargs=True),
            anatomy.text.register_forward_pre_hook(self._begin_text, with_kwargs=True),
            anatomy.text.register_forward_hook(self._end_text, always_call=True),
        ]
        first: Any = anatomy.layers[0]
        self._handles.append(first.register_forward_pre_hook(self._before_first_layer, with_kwargs=True, prepend=True))
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

    def _begin_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._close()
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._input_ids = input_ids
        self._attention_mask = kwargs.get("attention_mask")
        self._pictures = self.pictures.or_else(pictures_in(self.anatomy.adapter, kwargs))
        embeddings = kwargs.get("inputs_embeds")
        if input_ids is None and embeddings is not None:
            self._vision = self.anatomy.vision_mask(None, embeddings)

    def _begin_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        cache = cache_in(kwargs)
        given = kwargs
        if embeddings is None:
            if self._input_ids is not None:
                raise UnsupportedModelError(
                    "the language model was called without inputs_embeds: vision tokens cannot be located"
                )
            return None
        waits, kwargs = self._enter_chunk(kwargs, embeddings, cache)
        if waits:
            return None
        embeddings = kwargs["inputs_embeds"]
        batch, length = embeddings.shape[:2]
        static = bool(getattr(cache, "is_compileable", False))
        decoding = length == 1 and cache is not None
        # The length of a static cache lives on the device: a decode step does not wait for it, and needs it only where
        # its position ids count from there.
        seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
        past = 0 if static and decoding else int(seen)
        slots = different_slots(cache)
        config = self.anatomy.text.config
        forward = self._forward = Forward(
            batch=batch,
            length=length,
            past=past,
            static=static,
            positions=position_ids(kwargs.get("position_ids"), seen, length, embeddings.device),
            rotary=self.anatomy.text.rotary_emb,
            flash="flash" in str(getattr(config, "_attn_implementation", "")),
            shifts=[each.shift for each in slots if each.shift is not None],
        )
        if not decoding:
            self._locate = self._begin_prefill(embeddings, forward, cache)
        plain = all(each.plain for each in slots)
        forward.untouched = self._locate is None and not static and self._alike and plain
        if not forward.untouched:
            self._layer_hooks.mount()
        return None if kwargs is given else (args, kwargs)

    def _enter_chunk(self, kwargs: dict[str, Any], embeddings: Tensor, cache: Any) -> tuple[bool, dict[str, Any]]:
        """Whether a call of the text model brings a chunk that has to wait; and its arguments, with what has waited."""
        held = held_in(cache)
        if held is None and not self.chunked:
            return False, kwargs
        if self._vision is None and self._input_ids is not None:
            self._vision = vision_tokens(self.anatomy, self._input_ids, embeddings)
        vision = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        chunk = Chunk(kwargs, vision if self._vision is None else self._vision, self._pictures)
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        waits = self.chunked and self.limit is not None and past + embeddings.shape[1] < self.limit
        if waits and self.asked is not None:
            raise InputError(
                "labels, or logits_to_keep of several places: a chunk that waits for the rest of its prompt has no "
                "logits; ask for them with the last chunk"
            )
        if waits:
            self.waiting = chunk
            return True, kwargs
        if held is not None and self.asked is not None:
            self.asked = self.asked.behind(len(held), embeddings.shape[1])
        chunk = joined(chunk)
        self._vision, self._pictures = chunk.vision, chunk.pictures
        return False, dict(chunk.call)

    @property
    def prefill(self) -> Prefill | None:
        """The prefill that is running; None where no vision tokens came.

        Lazy: reading where tokens stand blocks the host, so it is done when a layer first asks. The layers before the
        first stage are queued on the device by then.
        """
        if self._locate is not None:
            locate, self._locate = self._locate, None
            self._prefill = locate()
        return self._prefill

    @property
    def decoding(self) -> bool:
        """Whether the forward that has begun is one more token on a cache."""
        return self._forward is not None and self._forward.length == 1 and self.prefill is None

    def graph_key(self) -> tuple[Hashable, ...]:
        """Part of the key of a compiled prefill: values that were Python constants when it was traced.

        Tokens that each stage keeps of each sample (None where the scores decide), text tokens that may rate, where
        there is padding, and whether positions count up.
        """
        prefill = self.prefill
        if prefill is None:
            return ()
        prompt = prefill.prompt
        question = prompt.tokens.question
        return prefill.counts, prompt.text.shape[1], question.padded, prompt.real is None, prompt.counts_up

    def dropped(self) -> list[int]:
        """By how many tokens the sequence is shorter at each layer of a prefill whose counts are all known."""
        prefill = self.prefill
        assert prefill is not None and self.pipeline.static
        return prefill.dropped(self.pipeline, self.depth)

    def _begin_prefill(self, embeddings: Tensor, forward: Forward, cache: Any) -> Callable[[], Prefill | None] | None:
        if self._vision is None and self._input_ids is None:
            return None
        read = start_reading(
            self.anatomy,
            vision=vision_tokens(self.anatomy, self._input_ids, embeddings) if self._vision is None else self._vision,
            real=real_tokens(self._attention_mask, forward.batch, forward.length, embeddings.device, forward.past),
            embeddings=embeddings,
            positions=forward.positions,
            pictures=self._pictures,
            limit=forward.length if self.limit is None else max(1, self.limit - forward.past),
            rated=any(stage.raters is not None for stage in self.pipeline),
            placed=self.pipeline.reads_grids,
        )

        def locate() -> Prefill | None:
            prompt = read()
            if prompt is None:
                return None
            total = prompt.tokens.total
            prefill = planned(prompt, self.pipeline, self.depth, forward.length)
            if prefill.drops:
                check_cache(cache)
            self._ran = []
            self.report.begin(total, prompt.grids, prompt.unrated)
            if self.buckets is not None and not self.pipeline.static:
                forward.bucket = -(-max(total) // self.buckets)
            return prefill

        return locate

    def _end_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            # `output` is None when the forward raised: its own error is the one to show.
            if output is not None:
                _ = self.prefill  # located now, if no layer has asked: then no stage has run
                if self._ran is not None:
                    self.report.finish(self._ran)
                if self.asked is not None and self._forward is not None:
                    answered = self.asked.answered(output[0], self._forward.alive, self._forward.length)
                    return output if answered is output[0] else with_hidden(output, answered)
            return None
        finally:
            self._close()

    def _close(self) -> None:
        self._input_ids = self._attention_mask = self._vision = self.waiting = None
        self._pictures = Pictures()
        self._forward = self._prefill = self._locate = self._ran = None
        self.taps.clear()

    # ---------------------------------------------------------------- forwards in parts (engine/packed/generate.py)

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Say what the base model would have been called with, ``[B, L]`` both: the caller calls the text model."""
        self._begin_base(self.anatomy.base, (), {"input_ids": input_ids, "attention_mask": attention_mask})

    @contextmanager
    def running(
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
        self.begin(input_ids, attention_mask)
        call = {"inputs_embeds": embeddings, "position_ids": positions, "cache": cache}
        output = None
        try:
            self._begin_text(self.anatomy.text, (), call)
            yield
            output = embeddings
        finally:
            self._end_text(self.anatomy.text, (), output)

    def layer_ran(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Say that layer `index` ran elsewhere, entered by `hidden` ``[B, L, D]`` and called with `kwargs`."""
        forward, prefill = self._forward, self.prefill
        if forward is not None and prefill is not None:
            self.taps.layer_enters(LayerCall(index, hidden, kwargs, None, forward, prefill), elsewhere=True)

    # ---------------------------------------------------------------- decoder layers

    def _before_first_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            prefill = self.prefill
            if prefill is None:
                return args, forward.adjust(kwargs, store)
            hidden = args[0] if args else kwargs["hidden_states"]
            if forward.alive is not None:
                virtualise(store)
            call = LayerCall(index, hidden, forward.adjust(kwargs, store), store, forward, prefill)
            for number in stages:
                hidden, ran = run_stage(number, self.pipeline.stages[number], call, self.taps)
                self._note(ran)
                if forward.alive is not None:
                    virtualise(store)
                call = LayerCall(index, hidden, forward.adjust(kwargs, store), store, forward, prefill)
            self.taps.layer_enters(call)
            if index >= first:
                forward.store(store)
            if index == self.depth - 1:
                self._prefill = None
            if args:
                return (hidden, *args[1:]), call.kwargs
            return args, {**call.kwargs, "hidden_states": hidden}

        return before_layer

    def _note(self, ran: StageReport) -> None:
        assert self._ran is not None
        self._ran.append(ran)


def _refuse_places(anatomy: Anatomy, pipeline: Pipeline) -> None:
    """Raise `UnsupportedModelError` for stages inside the vision tower: no hook is there yet."""
    for stage in pipeline:
        if stage.place.kind == "in_vision":
            raise UnsupportedModelError(
                f"{stage.name} ({stage.place}): stages inside the vision tower of {anatomy.adapter.title} are not "
                "supported yet; expected after_vision or before_layer"
            )
