"""The hooks that run a recipe's stages inside an unmodified model, and shorten its sequence from each stage's layer on.

A hook on the base model sees the prompt, one on the text model opens the state of the forward, one on each decoder
layer runs the stages of that layer and hands it the shorter sequence. Nothing of transformers is replaced; see
docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenprune.core.report import Report
from tokenprune.core.stage_report import StageReport
from tokenprune.engine.alive import refuse_numbers
from tokenprune.engine.asked import with_hidden
from tokenprune.engine.cache import adopt, cache_in, different_slots, layer_of, virtualise
from tokenprune.engine.cache_layers import Owner
from tokenprune.engine.deepstack import survivors_only
from tokenprune.engine.feed_forwards import FeedForwards
from tokenprune.engine.forward import Forward
from tokenprune.engine.hooks import Hooks, LayerHooks, Spot, by_name, forget_compiled
from tokenprune.engine.layer_call import LayerCall
from tokenprune.engine.leaving import Leaving
from tokenprune.engine.opening import Opening, entered_chunk
from tokenprune.engine.prompt import Prefill
from tokenprune.engine.reading import position_ids
from tokenprune.engine.running import run_stage
from tokenprune.engine.state import State, Threads
from tokenprune.engine.taps import Taps
from tokenprune.engine.tower import TowerTaps
from tokenprune.engine.traces import Handle, post_hook, pre_hook, shadow
from tokenprune.engine.unseen import Unseen, stated
from tokenprune.errors import UnsupportedModelError
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
        refuse_numbers(anatomy, pipeline)
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
        self.tower = TowerTaps(anatomy, pipeline, self.threads)
        report.notes = tuple(self.tower.notes)
        self.feed_forwards = FeedForwards(
            anatomy, pipeline, lambda: None if self.now.forward is None else self.now.forward.skipping
        )
        self.opening = Opening(anatomy, pipeline, report, self.tower, self.unseen, self.feed_forwards)
        self.taps = Taps(anatomy, pipeline, self.threads)
        below = any(stage.kv == "all_layers" for stage in pipeline)
        indices = [i for i in range(self.depth) if below or i >= self.first or i in self.taps.layers_read]
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
            pre_hook(anatomy.base, self.begin_base),
            post_hook(anatomy.base, self.end_base, always_call=True),
            pre_hook(anatomy.text, self.begin_text),
            post_hook(anatomy.text, self.end_text, always_call=True),
        ]
        self._handles += self.tower.mount()
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
        self.now.tower.clear()
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
        return [*self.taps.spots(), *self.feed_forwards.spots(), *before]

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

    def begin_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin_model(module, args, kwargs)
        kwargs = dict(by_name(module, args, kwargs))
        now = self.now
        now.close()
        if not now.chunked:
            now.tower.base_begins(kwargs)
        now.input_ids = kwargs.get("input_ids")
        now.attention_mask = kwargs.get("attention_mask")
        now.shown = now.pictures.or_else(pictures_in(self.anatomy.adapter, kwargs))
        embeddings = kwargs.get("inputs_embeds")
        if now.input_ids is None and embeddings is not None:
            now.vision = self.anatomy.vision_kinds(None, embeddings)

    def end_base(self, module: nn.Module, args: Any, output: Any) -> None:
        self.now.close()

    def begin_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        waits, kwargs = entered_chunk(self.anatomy, now, kwargs, embeddings, cache)
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
            now.locate = self.opening.begin(now, embeddings, forward, cache, self.buckets)
        plain = all(each.plain for each in slots)
        forward.untouched = now.locate is None and not static and self._alike and plain
        if not forward.untouched:
            self._layer_hooks.need(now)
        return None if kwargs is given else (args, kwargs)

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

    def end_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            # `output` is None when the forward raised: its own error is the one to show.
            if output is not None:
                _ = self.prefill  # located now, if no layer has asked: then no stage has run
                now = self.now
                if now.ran is not None:
                    self.report.finish(now.ran)
                if now.forward is not None and now.forward.leaving:
                    self._forget(now.forward)
                if now.asked is not None and now.forward is not None:
                    answered = now.asked.answered(output[0], now.forward.alive, now.forward.length)
                    return output if answered is output[0] else with_hidden(output, answered)
            return None
        finally:
            self.now.close()

    def _forget(self, forward: Forward) -> None:
        """Let caches lose what is to leave them now that the prefill is over."""
        if any(each.seen for each in forward.leaving):
            self._check_alone(forward)
        for each in forward.leaving:
            each.forget(forward.past, forward.length, self.owner, self.anatomy.recurrent)

    def _check_alone(self, forward: Forward) -> None:
        """Raise `UnsupportedModelError` where tokens behind the prompt came with it, and saw what they must not."""
        end, limit, asked = forward.past + forward.length, self.now.limit, self.now.asked
        hides = f"recipe {self.report.recipe!r}: kv: all_layers hides what is dropped from tokens behind the prompt, "
        if limit is not None and end > limit:
            raise UnsupportedModelError(
                f"{hides}and {end - limit} of them came together with it; let generate use its cache, no prompt "
                "lookup, or leave kv out of the recipe"
            )
        if asked is not None and asked.labels is not None:  # which of these tokens are an answer only the caller knows
            raise UnsupportedModelError(
                f"{hides}and labels ask for a loss over tokens that came together with it; run the prompt with "
                "use_cache and without labels, then what follows with labels, or leave kv out of the recipe"
            )

    def _leave(self, ran: StageReport, forward: Forward, cache: Any, index: int) -> None:
        """Note what leaves caches once the prefill is over, behind the stage that ran before the layer at `index`."""
        if ran.kv == "all_layers":
            alive = forward.alive if forward.skipping is None else forward.skipping.left
            if alive is not None:
                forward.leaving = [Leaving(cache, range(index), alive, seen=True)]
        if forward.skipping is not None:
            forward.leaving.append(Leaving(cache, range(index, self.depth), forward.skipping.left, seen=False))

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
                self._leave(ran, forward, cache_in(kwargs), index)
                if forward.alive is not None:
                    virtualise(store, self.owner)
                call = LayerCall(index, hidden, forward.adjust(kwargs, store, recurrent), store, forward, prefill)
            self.taps.layer_enters(call)
            kwargs = self.taps.glimpses.layer_enters(call)
            if index >= first:
                forward.store(store)
            if index == self.depth - 1:
                now.prefill = None
            args, kwargs = forward.beside(args, kwargs, self.anatomy.adapter.per_token)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return before_layer
