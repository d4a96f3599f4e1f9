"""Decoder runs of questions that share pictures: in one row (`Together`), or a row each from a layer on (`Apart`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from tokenprune.engine.attach import Attached
from tokenprune.engine.packed.in_parts import begin, begin_text_only, layer_ran, running
from tokenprune.engine.packed.prompt import PackedPrompt

PREFIX, NOBODY = -1, -2
"""Question numbers of tokens outside questions: all see the prefix, nobody sees padding."""


class _Run:
    """A packed prompt that is being answered: its cache, and the position ids that come next.

    Args:
        attached: the recipe on its model.
        prompt: what to ask.
    """

    def __init__(self, attached: Attached, prompt: PackedPrompt) -> None:
        self.report = attached.report
        self.engine = attached.engine
        self.parts = self.engine.anatomy
        self.prompt = prompt
        self.cache = DynamicCache()
        self.embed = self.parts.base.get_input_embeddings()
        self.sdpa = self.parts.text.config._attn_implementation == "sdpa"
        self.device = prompt.owner.device
        self.pictures, self.width = prompt.prefix_ids.shape
        self.first = torch.arange(self.width, device=self.device).expand(self.pictures, -1)
        """``[G, P]`` position ids of the prefix."""
        self.next = self.width + prompt.lengths
        """``[Q]`` position id of the token that comes next."""

    @contextmanager
    def _pictured(self, owner: Tensor | None = None) -> Iterator[None]:
        """The prefill: its pictures go through the vision tower once more if the recipe reads it.

        Args:
            owner: ``[Q]`` the picture of each row of the prefill; None: a row a picture.
        """
        taps, pixels = self.engine.tower, dict(self.prompt.pixels)
        if not taps.blocks_read or taps.stages is not None:
            yield
            return
        with taps.generating(self.pictures if owner is None else len(owner), pixels):
            self.parts.base.get_image_features(**pixels)
            if owner is not None:
                taps.repeat(self.pictures, owner)
            yield

    def _text(self, embedded: Tensor, mask: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Final hidden states ``[B, n, D]`` of the whole text model, behind what its cache holds; without `ids` of text
        alone."""
        if ids is None:
            begin_text_only(self.engine)
        else:
            begin(self.engine, ids)
        output = self.parts.text(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.parts.cache_name: self.cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        model: Any = self.parts.model
        logits: Tensor = model.get_output_embeddings()(hidden)
        return logits

    def _mask(self, visible: Tensor) -> Tensor:
        """``[B, 1, n, K]`` as the layers' attention takes it, from bool ``[B, n, K]``."""
        if self.sdpa:
            return visible[:, None]
        dtype = self.prompt.prefix.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


class Together(_Run):
    """A row for each picture in all layers: where no stage looks at the question.

        [BOS | vision | question 1 | question 2 | ... | answers, a token of each at a time]

    A question sees the prefix and itself, and its positions continue from the prefix: it is as if it were alone.
    """

    def __init__(self, attached: Attached, prompt: PackedPrompt) -> None:
        super().__init__(attached, prompt)
        owners, lengths = prompt.owner.tolist(), prompt.lengths.tolist()
        start, used, asked = [], [0] * self.pictures, [0] * self.pictures
        number = []
        for owner, length in zip(owners, lengths, strict=True):
            start.append(used[owner])
            number.append(asked[owner])
            used[owner] += length
            asked[owner] += 1
        self.number = torch.tensor(number, device=self.device)
        """``[Q]`` index of each question among those about its picture."""
        self.size, self.most = max(used), max(asked)
        place = torch.arange(prompt.text_ids.shape[1], device=self.device)
        self.start = torch.tensor(start, device=self.device)
        self.real = place < prompt.lengths[:, None]
        self.at = (prompt.owner[:, None].expand_as(self.real)[self.real], (self.start[:, None] + place)[self.real])
        """Row and column of every real text token."""
        self.keys = torch.full((self.pictures, self.width), PREFIX, device=self.device)
        """``[G, K]`` question number of every cached token: an index as in `number`, `PREFIX` or `NOBODY`."""

    def prefill(self) -> Tensor:
        """Logits ``[Q, vocabulary]`` of the first token of each answer."""
        prompt, owner = self.prompt, self.prompt.owner
        with self._pictured():
            self._text(prompt.prefix, torch.ones_like(prompt.prefix_ids), self.first, prompt.prefix_ids)
        self.report.select(owner.tolist())
        numbers = self._rows(self.number[:, None].expand_as(self.real), NOBODY)
        place = torch.arange(prompt.text_ids.shape[1], device=self.device).expand_as(self.real)
        positions = self._rows(self.width + place, self.width)
        order = torch.arange(self.size, device=self.device)
        earlier = pad(order[:, None] >= order, (self.width, 0), value=True)
        hidden = self._forward(self._rows(prompt.text_ids, 0), positions, numbers, earlier)
        return self._logits(hidden[owner, self.start + prompt.lengths - 1])

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[Q, vocabulary]`` of what follows `token` ``[Q]``."""
        at = (self.prompt.owner, self.number)
        shape = (self.pictures, self.most)
        rows = [torch.full(shape, fill, device=self.device) for fill in (0, self.width, NOBODY)]
        ids, positions, numbers = (
            row.index_put(at, value) for row, value in zip(rows, (token, self.next, self.number), strict=True)
        )
        self.next = self.next + 1
        hidden = self._forward(ids, positions, numbers, None)
        return self._logits(hidden[at])

    def _forward(self, ids: Tensor, positions: Tensor, numbers: Tensor, earlier: Tensor | None) -> Tensor:
        """Final hidden states ``[G, n, D]`` of `ids` ``[G, n]``, behind what is stored.

        `numbers` ``[G, n]`` are their question numbers: a token sees the prefix and its own question.
        `earlier` ``[n, K]`` is True where a key stands before the token; None where a row has one token a question.
        """
        self.keys = torch.cat([self.keys, numbers], dim=1)
        keys = self.keys[:, None]
        # Padding sees the prefix like all others, so that no row of a softmax is empty.
        visible = (keys == PREFIX) | ((keys == numbers[..., None]) & (keys >= 0))
        if earlier is not None:
            visible = visible & earlier
        return self._text(self.embed(ids), self._mask(visible), positions)

    def _rows(self, values: Tensor, fill: int) -> Tensor:
        """``[G, S]`` of `values` ``[Q, T]``: the questions about a picture one after another."""
        rows = torch.full((self.pictures, self.size), fill, device=self.device)
        return rows.index_put(self.at, values[self.real])


class Apart(_Run):
    """A row for each question from layer `shared` on, where a stage first looks at it.

        picture     [BOS | vision]  ── layers below, once ──┐
        question 1                  [text] ── layers below ──┴─▶ [BOS | vision | text] ── stage, layers above
        question 2                  [text] ── layers below ──┴─▶ [BOS | vision | text] ── stage, layers above

    Padding stands behind the questions: causal attention hides it without a mask.
    """

    def __init__(self, attached: Attached, prompt: PackedPrompt, shared: int) -> None:
        super().__init__(attached, prompt)
        self.shared = shared
        self.mask = prompt.attention_mask
        text = prompt.text_ids.shape[1]
        self.later = torch.arange(self.width, self.width + text, device=self.device).expand(len(prompt.owner), -1)
        """``[Q, T]`` position ids of the questions."""

    def prefill(self) -> Tensor:
        """Logits ``[Q, vocabulary]`` of the first token of each answer."""
        prompt, owner, shared = self.prompt, self.prompt.owner, self.shared
        prefix, text = prompt.prefix, self.embed(prompt.text_ids)
        embedded = entered = torch.cat([prefix[owner], text], dim=1)
        positions = torch.cat([self.first[owner], self.later], dim=1)
        above = DynamicCache()  # by itself, as the engine takes what is stored already for an earlier turn
        of_prefix = self._arguments(prefix, self.first, self.cache)
        of_text = self._arguments(text, self.later, self.cache, past=self.width)
        of_rows = self._arguments(embedded, positions, above)
        begin_text_only(self.engine)
        for index, layer in enumerate(self.parts.layers[:shared]):
            if index == shared - 1:
                entered = torch.cat([prefix[owner], text], dim=1)
            prefix = layer(prefix, **of_prefix)
            self.cache.layers[index].batch_select_indices(owner)
            text = layer(text, **of_text)
        hidden = torch.cat([prefix[owner], text], dim=1)
        prefill_runs = running(self.engine, prompt.input_ids, self.mask, embedded, positions, above)
        with self._pictured(owner), prefill_runs:
            if shared:
                layer_ran(self.engine, shared - 1, entered, of_rows)
            for layer in self.parts.layers[shared:]:
                hidden = layer(hidden, **of_rows)
        self.cache.layers = [*self.cache.layers[:shared], *above.layers[shared:]]
        row = torch.arange(len(hidden), device=self.device)
        last = hidden[row, prompt.lengths - 1 - text.shape[1]]  # text stands at the end, whatever was dropped
        return self._logits(self.parts.text.norm(last))

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[Q, vocabulary]`` of what follows `token` ``[Q]``."""
        self.mask = pad(self.mask, (0, 1), value=1)
        hidden = self._text(self.embed(token[:, None]), self.mask, self.next[:, None])
        self.next = self.next + 1
        return self._logits(hidden[:, -1])

    def _arguments(self, hidden: Tensor, positions: Tensor, cache: DynamicCache, *, past: int = 0) -> dict[str, Any]:
        """What the text model would call a decoder layer with, with `past` tokens in the cache."""
        mask = None
        if past or not self.sdpa:  # without a mask sdpa is causal by itself, but counts from the first key
            n = hidden.shape[1]
            mask = self._mask(torch.ones(1, n, past + n, dtype=torch.bool, device=self.device).tril(past))
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self.parts.text.rotary_emb(hidden, position_ids=positions),
            self.parts.cache_name: cache,
            "use_cache": True,
        }
