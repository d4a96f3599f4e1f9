"""The hooks that run a recipe's stages inside an unmodified model, and shorten its sequence from each stage's layer on.

A hook on the base model sees the prompt, one on the text model opens the state of the forward, one on each decoder
layer runs the stages of that layer and hands it the shorter sequence. Nothing of transformers is replaced; see
docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenprune.core.report import Report
from tokenprune.engine.asked import with_hidden
from tokenprune.engine.cache import Owner, adopt, cache_in, check_cache, different_slots, held_in, layer_of, virtualise
from tokenprune.engine.chunks import Chunk, joined
from tokenprune.engine.deepstack import survivors_only
from tokenprune.engine.forward import Forward
from tokenprune.engine.hooks import Hooks, LayerHooks, Spot, forget_compiled
from tokenprune.engine.prompt import Prefill, planned
from tokenprune.engine.reading import position_ids, real_tokens, start_reading, vision_tokens
from tokenprune.engine.running import run_stage
from tokenprune.engine.state import State, Threads
from tokenprune.engine.taps import LayerCall, Taps
from tokenprune.engine.traces import Handle, post_hook, pre_hook, shadow
from tokenprune.engine.unseen import Unseen, stated
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import Anatomy, pictures_in
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
        self.threads = Threads()
        self.owner = Owner(report.recipe, report.fingerprint, lambda: self.now.forward is not None)
        """Of the caches that the recipe shortens."""
        self.unseen = Unseen(report)
        _refuse_places(anatomy, pipeline)
        self.taps = Taps(anatomy, pipeline, self.threads)
        indices = [i for i in range(self.depth) if i >= self.first or i in self.taps.layers_read]
        self._before = {index: self._layer_hook(index) for index in indices}
        """The hook of each layer that has one. The first layer's runs in any case."""
        self._first_hook = Hooks(
            lambda: [(self._layers()[0], partial(pre_hook, hook=self._before_first_layer, prepend=True))]
        )
        self._layer_hooks = LayerHooks(self._spots, self.threads)
        # Only if all layers are of one type does the first layer's mask tell what the others get.
        self._alike = len(set(getattr(anatomy.text.config, "layer_types", None) or ())) < 2
        self._handles: list[Handle] = []

    @property
    def now(self) -> State:
        """What the calling thread's forward knows."""
        return self.threads.now

    # ---------------------------------------------------------------- mounting

    def mount(self) -> None:
        """Add the hooks."""
        anatomy = self.anatomy
        self._handles = [
            pre_hook(anatomy.model, self._begin_model),
            pre_hook(anatomy.base, self._begin_base),
            post_hook(anatomy.base, self._end_base, always_call=True),
            pre_hook(anatomy.text, self._begin_text),
            post_hook(anatomy.text, self._end_text, always_call=True),
        ]
        self._first_hook.mount()
        self._layer_hooks.mount()
        if anatomy.adapter.deepstack is not None:
            original = getattr(anatomy.text, anatomy.adapter.deepstack)
            added = survivors_only(original, lambda: self.now.forward)
            self._handles.append(shadow(anatomy.text, anatomy.adapter.deepstack, added))

    def unmount(self) -> None:
        """Remove the hooks, and the state of any forward that did not end."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._first_hook.unmount()
        self._layer_hooks.unmount()
        self.now.close()

    def _layers(self) -> Any:
        """The decoder layers that the model has now."""
        layers = self.anatomy.layers
        if len(layers) != self.depth:
            raise UnsupportedModelError(
                f"recipe {self.report.recipe!r} was attached to {self.depth} decoder layers, and now there are "
                f"{len(layers)}; detach it before layers come or go, and attach it anew"
            )
        return layers

    def _spots(self) -> list[Spot]:
        """Hooks of the layers. Before all others of the layer, which then see what the layer will."""
        layers = self._layers()
        before = [(layers[i], partial(pre_hook, hook=hook, prepend=True)) for i, hook in self._before.items() if i]
        return [*self.taps.spots(), *before]

    def _follow(self) -> None:
        """Move hooks if modules of the model were exchanged since the last prefill (LoRA, quantisation, surgery)."""
        self._layers()
        self.taps.follow()
        with self.threads.lock:
            first, others = self._first_hook.follow(), self._layer_hooks.follow()
        if first or others:
            forget_compiled()

    # ---------------------------------------------------------------- base model and text model

    def _begin_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `UnsupportedModelError` if the hooks stand on modules that the model has no more."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.shape[-1] == 1:
            return  # decoding
        if not self.anatomy.current:
            raise UnsupportedModelError(
                f"recipe {self.report.recipe!r}: the language model of {type(self.anatomy.model).__name__} was "
                "exchanged while the recipe was attached; detach it before, and attach it anew"
            )

    def _begin_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin_model(module, args, kwargs)
        now = self.now
        now.close()
        now.input_ids = kwargs.get("input_ids", args[0] if args else None)
        now.attention_mask = kwargs.get("attention_mask")
        now.shown = now.pictures.or_else(pictures_in(self.anatomy.adapter, kwargs))
        embeddings = kwargs.get("inputs_embeds")
        if now.input_ids is None and embeddings is not None:
            now.vision = self.anatomy.vision_mask(None, embeddings)

    def _end_base(self, module: nn.Module, args: Any, output: Any) -> None:
        self.now.close()

    def _begin_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.now
        embeddings = kwargs.get("inputs_embeds")
        cache = cache_in(kwargs)
        given = kwargs
        if embeddings is None:
            if now.input_ids is not None:
                raise UnsupportedModelError(
                    "the language model was called without inputs_embeds: vision tokens cannot be located"
                )
            now.text_only = True
            return None
        if now.input_ids is None and now.told is not None and not (embeddings.shape[1] == 1 and cache is not None):
            now.vision, now.sure = stated(now.told, embeddings), True
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
        adopt(cache, self.owner)
        slots = different_slots(cache)
        config = self.anatomy.text.config
        forward = now.forward = Forward(
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
            self._follow()
            now.locate = self._begin_prefill(embeddings, forward, cache)
        plain = all(each.plain for each in slots)
        forward.untouched = now.locate is None and not static and self._alike and plain
        if not forward.untouched:
            self._layer_hooks.need(now)
        return None if kwargs is given else (args, kwargs)

    def _enter_chunk(self, kwargs: dict[str, Any], embeddings: Tensor, cache: Any) -> tuple[bool, dict[str, Any]]:
        """Whether a call of the text model brings a chunk that has to wait; and its arguments, with what has waited."""
        now, held = self.now, held_in(cache)
        if held is None and not now.chunked:
            return False, kwargs
        if now.vision is None and now.input_ids is not None:
            now.vision = vision_tokens(self.anatomy, now.input_ids, embeddings)
        vision = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        chunk = Chunk(kwargs, vision if now.vision is None else now.vision, now.shown)
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        waits = now.chunked and now.limit is not None and past + embeddings.shape[1] < now.limit
        if waits and now.asked is not None:
            raise InputError(
                "labels, or logits_to_keep of several places: a chunk that waits for the rest of its prompt has no "
                "logits; ask for them with the last chunk"
            )
        if waits:
            now.waiting = chunk
            return True, kwargs
        if held is not None and now.asked is not None:
            now.asked = now.asked.behind(len(held), embeddings.shape[1])
        chunk = joined(chunk)
        now.vision, now.shown = chunk.vision, chunk.pictures
        return False, dict(chunk.call)

    @property
    def prefill(self) -> Prefill | None:
        """The prefill that is running; None where no vision tokens came.

        Lazy: reading where tokens stand blocks the host, so it is done when a layer first asks. The layers before the
        first stage are queued on the device by then.
        """
        now = self.now
        if now.locate is not None:
            locate, now.locate = now.locate, None
            now.prefill = locate()
        return now.prefill

    @property
    def decoding(self) -> bool:
        """Whether the forward that has begun is one more token on a cache."""
        forward = self.now.forward
        return forward is not None and forward.length == 1 and self.prefill is None

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
        now = self.now
        if now.text_only:
            return None
        vision = now.vision
        if vision is None:
            if now.input_ids is None:
                self.unseen.embeddings()
                return None
            vision = vision_tokens(self.anatomy, now.input_ids, embeddings)
        guessed = now.input_ids is None and not now.sure
        read = start_reading(
            self.anatomy,
            vision=vision,
            real=real_tokens(now.attention_mask, forward.batch, forward.length, embeddings.device, forward.past),
            embeddings=embeddings,
            positions=forward.positions,
            pictures=now.shown,
            limit=forward.length if now.limit is None else max(1, now.limit - forward.past),
            rated=any(stage.raters is not None for stage in self.pipeline),
            placed=self.pipeline.reads_grids,
        )

        def locate() -> Prefill | None:
            prompt = read()
            if prompt is None:
                if guessed:
                    self.unseen.embeddings()
                return None
            total = prompt.tokens.total
            prefill = planned(prompt, self.pipeline, self.depth, forward.length)
            if prefill.drops:
                check_cache(cache)
                if forward.flash and self.anatomy.windowed:
                    raise UnsupportedModelError(
                        "flash attention counts a sliding window in the tokens that it is given, which are fewer after "
                        "a stage; load the model with attn_implementation='sdpa' or 'eager'"
                    )
            now.ran = []
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
                now = self.now
                if now.ran is not None:
                    self.report.finish(now.ran)
                if now.asked is not None and now.forward is not None:
                    answered = now.asked.answered(output[0], now.forward.alive, now.forward.length)
                    return output if answered is output[0] else with_hidden(output, answered)
            return None
        finally:
            self.now.close()

    # ---------------------------------------------------------------- forwards in parts (engine/packed/generate.py)

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Say what the base model would have been called with, ``[B, L]`` both: the caller calls the text model."""
        self._begin_base(self.anatomy.base, (), {"input_ids": input_ids, "attention_mask": attention_mask})

    def begin_text_only(self) -> None:
        """Say that the caller calls the text model, or some of its layers, with no vision token."""
        self.now.close()
        self.now.text_only = True

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
        forward, prefill = self.now.forward, self.prefill
        if forward is not None and prefill is not None:
            self.taps.layer_enters(LayerCall(index, hidden, kwargs, None, forward, prefill), elsewhere=True)

    # ---------------------------------------------------------------- decoder layers

    def _before_first_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first layer's hook: the first to see the mask that the text model has made."""
        now, hook = self.now, self._before.get(0)
        forward = now.forward
        if forward is None:
            if not now.text_only:
                self.unseen.layers(args[0] if args else kwargs.get("hidden_states"))
            return None
        if forward.untouched:
            if kwargs.get("attention_mask") is None:
                self._layer_hooks.spare(now)
                return None
            self._layer_hooks.need(now)
        return None if hook is None else hook(layer, args, kwargs)

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        stages = [i for i, layer in enumerate(self.layers) if layer == index]
        first, recurrent = self.first, index in self.anatomy.recurrent

        def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            now = self.now
            forward = now.forward
            if forward is None or kwargs is None:  # see LayerHooks
                return None
            # A recurrent layer has a state and no keys: it needs no more than the mask of the tokens it is given.
            store = None if recurrent else layer_of(cache_in(kwargs), index)
            prefill = self.prefill
            if prefill is None:
                return args, forward.adjust(kwargs, store)
            hidden = args[0] if args else kwargs["hidden_states"]
            if forward.alive is not None:
                virtualise(store, self.owner)
            call = LayerCall(index, hidden, forward.adjust(kwargs, store, recurrent), store, forward, prefill)
            for number in stages:
                hidden, ran = run_stage(number, self.pipeline.stages[number], call, self.taps)
                assert now.ran is not None
                now.ran.append(ran)
                if forward.alive is not None:
                    virtualise(store, self.owner)
                call = LayerCall(index, hidden, forward.adjust(kwargs, store, recurrent), store, forward, prefill)
            self.taps.layer_enters(call)
            if index >= first:
                forward.store(store)
            if index == self.depth - 1:
                now.prefill = None
            args, kwargs = forward.beside(args, call.kwargs, self.anatomy.adapter.per_token)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return before_layer


def _refuse_places(anatomy: Anatomy, pipeline: Pipeline) -> None:
    """Raise `UnsupportedModelError` for stages inside the vision tower, where no hook is yet, and for position ids that
    one table of rotary embeddings cannot hold."""
    for stage in pipeline:
        if stage.positions == "renumber" and (anatomy.rotary_by_type or anatomy.counts_places):
            own = "types of layers have rotary embeddings of their own"
            scaled = "queries are scaled by their position ids"
            raise UnsupportedModelError(
                f"{stage.name} ({stage.place}): positions: renumber is not supported for {anatomy.adapter.title}, "
                f"whose {own if anatomy.rotary_by_type else scaled}; expected original"
            )
        if stage.place.kind == "in_vision":
            raise UnsupportedModelError(
                f"{stage.name} ({stage.place}): stages inside the vision tower of {anatomy.adapter.title} are not "
                "supported yet; expected after_vision or before_layer"
            )
