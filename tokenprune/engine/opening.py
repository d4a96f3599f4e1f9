"""What a call of the text model brings: a chunk that has to wait for its prompt, or a prefill that is to be located."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.core.report import Report
from tokenprune.engine.cache import check_cache, held_in
from tokenprune.engine.chunks import Chunk, joined
from tokenprune.engine.feed_forwards import FeedForwards
from tokenprune.engine.forward import Forward
from tokenprune.engine.prompt import Prefill, planned
from tokenprune.engine.reading import real_tokens, start_reading, vision_tokens
from tokenprune.engine.state import State
from tokenprune.engine.tower import TowerTaps
from tokenprune.engine.unseen import Unseen
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.anatomy import Anatomy
from tokenprune.pipeline import Pipeline


def entered_chunk(
    anatomy: Anatomy, now: State, kwargs: dict[str, Any], embeddings: Tensor, cache: Any
) -> tuple[bool, dict[str, Any]]:
    """Whether a call of the text model brings a chunk that has to wait; and its arguments, with what has waited."""
    held = held_in(cache)
    if held is None and not now.chunked:
        return False, kwargs
    if now.vision is None and now.input_ids is not None:
        now.vision = vision_tokens(anatomy, now.input_ids, embeddings)
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


class Opening:
    """Says where the vision tokens of a prefill stand, and how many of them each stage will keep.

    Args:
        anatomy: the model's modules.
        pipeline: stages and budget.
        report: told of each prompt.
        tower: signals and stages of the vision tower.
        unseen: told of calls whose vision tokens nobody can tell.
        feed_forwards: asked whether tokens may skip them.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        pipeline: Pipeline,
        report: Report,
        tower: TowerTaps,
        unseen: Unseen,
        feed_forwards: FeedForwards,
    ) -> None:
        self.anatomy = anatomy
        self.pipeline = pipeline
        self.report = report
        self.tower = tower
        self.unseen = unseen
        self.feed_forwards = feed_forwards
        self.depth = len(anatomy.layers)

    def begin(
        self, now: State, embeddings: Tensor, forward: Forward, cache: Any, buckets: int | None
    ) -> Callable[[], Prefill | None] | None:
        """What finds the prefill when a layer first asks; None where no vision tokens come.

        Args:
            now: what is known of the forward; told of its stages when it is located.
            embeddings: ``[B, L, D]`` that enter the first layer.
            forward: told of the bucket of its prompt.
            cache: refused if a stage drops tokens and its layers cannot be shortened.
            buckets: as `Engine.buckets`.
        """
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
            ends=any(stage.reads.glimpse for stage in self.pipeline),
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
                self.feed_forwards.check(flash=forward.flash)
            if prefill.tower:
                prefill.prompt = self.tower.told(prompt, prefill.tower)
            if self.tower.stages is not None:
                prefill.follow(self.tower.gone(prompt))
            now.ran = []
            self.report.begin(total, prompt.grids, prompt.unrated)
            if buckets is not None and not self.pipeline.static:
                forward.bucket = -(-max(total) // buckets)
            return prefill

        return locate
