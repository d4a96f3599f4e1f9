"""The law that pruning is judged by: the unpruned model, in which dropped vision tokens are hidden instead of removed.

From a stage's layer on, no token but itself sees a dropped vision token. Nothing is shortened: masks, positions, caches
and `generate` are those of the plain model, and the rows of dropped tokens are still computed, seen by nobody. So

    with masked_reference(model, vision_mask(model, batch["input_ids"]), [Hidden(2, kept), Hidden(5, kept_later)]):
        expected = model.generate(**batch)

is what a model that really drops those tokens must answer. It knows nothing of how tokens are dropped elsewhere.

Coordinates: `column` is a token's place in the padded prompt, which is also its slot in an unpruned cache; `kept` and
`anchors` count the sample's vision tokens (0 is the first one), -1 where padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Merging = Callable[[int, Tensor], Tensor]
"""From a sample's number and the hidden states [N, D] of its vision tokens, the merged ones [M, D] of its anchors."""


class Hidden(NamedTuple):
    """What one stage did: which vision tokens are hidden from its layer on. A plain tuple of the fields will do."""

    layer: int | None
    """The first decoder layer that sees fewer tokens; None (after vision) is layer 0."""
    kept: Tensor
    """int64 [B, K]: the vision tokens that survive, padded with -1."""
    anchors: Tensor | None = None
    """int64 [B, M]: survivors whose slot holds a merged token from here on, padded with -1; need not be in `kept`."""
    merged: Tensor | Merging | None = None
    """What is written there as this layer's input: [B, M, D], or a function that computes it from the layer's input."""
    bias: Tensor | None = None
    """float [B, vision tokens]: from this layer on, added to the logits of whoever looks at a vision token; None: as an
    earlier stage has it."""
    everywhere: bool = False
    """Whether tokens behind the prompt do not see, in the layers before this one either, what is not left here."""
    skips: bool = False
    """Whether what is not left here stays, and passes by the feed-forward: hidden from all tokens but vision tokens of
    the prompt, and no feed-forward is added to it."""


def vision_mask(model: Any, input_ids: Tensor) -> Tensor:
    """True on the placeholders of image and video: bool ``[B, L]`` from input_ids ``[B, L]``."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))


@contextmanager
def masked_reference(model: Any, vision: Tensor, stages: Sequence[Hidden | tuple[Any, ...]]) -> Iterator[None]:
    """Hide, in every forward of `model` inside the block, the vision tokens that the stages dropped.

    `vision` is bool [B, L] over the prompt (over all turns so far, if a later turn brings images again). Serves
    forward and `generate` with sdpa or eager attention, dynamic or static cache or none; batches that `generate`
    expands (beams, several answers) repeat each row. `kept` of later stages must lie within that of earlier ones.
    """
    steps = [Hidden(*stage) for stage in stages]
    columns = [row.nonzero().flatten() for row in vision]
    hidden_columns, biases, shy = torch.zeros_like(vision), None, None
    behind = [(step.layer or 0, vision & ~visible_columns(vision, columns, step)) for step in steps if step.everywhere]
    seen = _Seen()
    handles = [model.get_decoder().register_forward_pre_hook(seen, with_kwargs=True)]
    try:
        for index, layer in enumerate(model.get_decoder().layers):
            here = [step for step in steps if (step.layer or 0) == index]
            for step in here:
                visible = visible_columns(vision, columns, step)
                if (visible & hidden_columns).any():
                    raise ValueError(f"a stage before layer {index} keeps vision tokens that an earlier stage dropped")
                if step.skips:
                    shy = _Shy(vision, vision & ~visible & ~hidden_columns)
                else:
                    hidden_columns = vision & ~visible
                if step.bias is not None:
                    biases = _by_column(vision, columns, step.bias)
            later = next((gone for at, gone in reversed(behind) if at > index), None)
            reduced = any((step.layer or 0) <= index for step in steps)
            if reduced or (later is not None and hasattr(layer, "self_attn")):
                if hasattr(layer, "self_attn"):
                    hook = _LayerHook(index, here, columns, hidden_columns, biases, later, shy)
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                    if shy is not None:
                        feeds = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
                        handles.append(feeds.register_forward_hook(partial(shy.unfed, seen)))
                else:
                    handles += _recurrent_hooks(layer, here, columns, hidden_columns, seen)
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """Pre-hook of the language model: how many tokens its cache holds when a forward begins."""

    past = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.past = 0 if cache is None else int(cache.get_seq_length())


class _Shy(NamedTuple):
    """Vision tokens that vision tokens alone see, and that no feed-forward is added to."""

    vision: Tensor
    """bool [B, L] over the prompt."""
    skip: Tensor
    """bool [B, L]: those of them."""

    def unfed(self, seen: _Seen, module: Any, args: Any, output: Tensor) -> Tensor:
        """Hook behind a feed-forward: what it gives, and 0 for those that skip."""
        rows, length = output.shape[:2]
        here = pad(self.skip, (0, max(0, seen.past + length - self.skip.shape[1])))[:, seen.past : seen.past + length]
        return output.masked_fill(here.repeat_interleave(rows // len(here), dim=0)[..., None], 0.0)


class _LayerHook:
    """Pre-hook of one decoder layer: writes merged tokens, then hides columns."""

    def __init__(
        self,
        index: int,
        stages: Sequence[Hidden],
        columns: Sequence[Tensor],
        hidden_columns: Tensor,
        biases: Tensor | None,
        later: Tensor | None = None,
        shy: _Shy | None = None,
    ) -> None:
        self.index, self.stages, self.columns, self.hidden_columns = index, stages, columns, hidden_columns
        self.biases = biases
        self.later = later
        """bool [B, L]: columns that are hidden from tokens behind the prompt alone."""
        self.shy = shy

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, *rest = args
        batch, length = hidden.shape[:2]
        expansion, remainder = divmod(batch, len(self.columns))
        if remainder:
            raise ValueError(f"{batch} rows in the model, {len(self.columns)} in the reference")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in transformers 5.24
        past, width, offset = 0, length, 0  # column of this forward's first token; columns that attention will see
        if cache is not None:
            past = int(cache.get_seq_length(self.index))
            width, offset = cache.get_mask_sizes(length, self.index)
        for stage in self.stages:
            hidden = self.write_merged(hidden, stage, past, expansion)

        mask = kwargs.get("attention_mask")
        queries = past + torch.arange(length, device=hidden.device)[:, None]
        keys = offset + torch.arange(width, device=hidden.device)
        if mask is None:
            window = getattr(layer.self_attn, "sliding_window", None)
            mask = _dense_causal(queries, keys, hidden.dtype, layer.self_attn.config._attn_implementation, window)
        if mask.ndim != 4 or mask.shape[-1] != width:
            raise ValueError(f"attention mask {tuple(mask.shape)}: expected 4 dimensions and {width} columns")
        end = offset + width
        dropped = self._columns(self.hidden_columns, offset, end, expansion)
        if self.later is not None:
            behind = queries >= self.later.shape[1]
            dropped = dropped | (self._columns(self.later, offset, end, expansion) & behind)
        if self.shy is not None:
            text = ~self._columns(self.shy.vision, past, past + length, expansion).mT
            dropped = dropped | (self._columns(self.shy.skip, offset, end, expansion) & text)
        dropped = dropped & (queries != keys)  # a dropped token still sees itself, else its row would be NaN
        mask = mask & ~dropped if mask.dtype == torch.bool else mask.masked_fill(dropped, torch.finfo(mask.dtype).min)
        if self.biases is not None:
            lowest = torch.finfo(hidden.dtype).min
            numbers = (
                torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, lowest)
                if mask.dtype == torch.bool
                else mask
            )
            bias = pad(self.biases, (0, max(0, end - self.biases.shape[1])))[:, offset:end]
            mask = numbers + bias.to(hidden.dtype).repeat_interleave(expansion, dim=0)[:, None, None, :]
        return (hidden, *rest), kwargs | {"attention_mask": mask}

    @staticmethod
    def _columns(mask: Tensor, start: int, end: int, expansion: int) -> Tensor:
        """bool [rows, 1, 1, end - start]: those columns of a mask [B, L] over the prompt, False behind it."""
        wide = pad(mask, (0, max(0, end - mask.shape[1])))[:, start:end]
        return wide.repeat_interleave(expansion, dim=0)[:, None, None, :]

    def write_merged(self, hidden: Tensor, stage: Hidden, past: int, expansion: int) -> Tensor:
        """`hidden` [rows, length, D] with merged tokens in those of the anchors' slots that this forward holds."""
        if stage.merged is None or stage.anchors is None:
            return hidden
        hidden = hidden.clone()
        for row in range(len(hidden)):
            sample = row // expansion
            real = stage.anchors[sample] >= 0
            slots = self.columns[sample] - past
            inside = (slots >= 0) & (slots < hidden.shape[1])
            if not inside.any():
                continue  # a decode step or a text turn: the vision tokens went by before
            if isinstance(stage.merged, Tensor):
                merged = stage.merged[sample][real]
            elif inside.all():
                merged = stage.merged(sample, hidden[row, slots])
            else:
                raise ValueError("a function can merge only vision tokens that come in one forward: give a tensor")
            anchors = stage.anchors[sample][real]
            here = inside[anchors]
            hidden[row, slots[anchors[here]]] = merged[here]
        return hidden


def _recurrent_hooks(
    layer: Any, stages: Sequence[Hidden], columns: Sequence[Tensor], hidden_columns: Tensor, seen: _Seen
) -> list[Any]:
    """Hooks on a layer that reads tokens one after the other into a state, where no mask can hide one from the next.

    Its mixer is handed the survivors alone, flush right behind zeros, as it is handed prompts that are padded on the
    left; what it says of them goes back to their columns. Everything else of the layer runs on all columns.
    """
    writer = _LayerHook(0, stages, columns, hidden_columns, None)
    mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.conv
    state: dict[str, Any] = {}

    def write(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        for stage in stages:
            hidden = writer.write_merged(hidden, stage, seen.past, len(hidden) // len(columns))
        return (hidden, *args[1:]), kwargs

    def compress(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        state.clear()
        end = seen.past + hidden.shape[1]
        gone = pad(hidden_columns, (0, max(0, end - hidden_columns.shape[1])))[:, seen.past : end]
        if not gone.any():
            return None
        gone = gone.repeat_interleave(len(hidden) // len(columns), 0)
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(gone) if mask is None else mask.bool()
        rows = [(~gone[row] & real[row]).nonzero().flatten() for row in range(len(hidden))]
        longest = max(map(len, rows))
        short = hidden.new_zeros(len(rows), longest, hidden.shape[-1])
        there = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, own in enumerate(rows):
            short[row, longest - len(own) :], there[row, longest - len(own) :] = hidden[row, own], True
        state.update(rows=rows, length=hidden.shape[1])
        kwargs = kwargs | {"attention_mask": None if there.all() else there}
        return ((short, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": short})

    def expand(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not state:
            return None
        full = output.new_zeros(len(output), state["length"], output.shape[-1])
        for row, own in enumerate(state["rows"]):
            full[row, own] = output[row, output.shape[1] - len(own) :]
        return full

    return [
        layer.register_forward_pre_hook(write, with_kwargs=True),
        mixer.register_forward_pre_hook(compress, with_kwargs=True),
        mixer.register_forward_hook(expand),
    ]


def visible_columns(vision: Tensor, columns: Sequence[Tensor], stage: Hidden) -> Tensor:
    """bool [B, L]: the columns of the vision tokens that survive the stage."""
    visible = torch.zeros_like(vision)
    for sample, own in enumerate(columns):
        for survivors in (stage.kept, stage.anchors):
            if survivors is not None:
                visible[sample, own[survivors[sample][survivors[sample] >= 0]]] = True
    return visible


def _by_column(vision: Tensor, columns: Sequence[Tensor], bias: Tensor) -> Tensor:
    """float [B, L]: biases of vision tokens at their columns, 0 at text."""
    placed = torch.zeros(vision.shape)
    for sample, own in enumerate(columns):
        placed[sample, own] = bias[sample, : len(own)].float()
    return placed


def _dense_causal(
    queries: Tensor, keys: Tensor, dtype: torch.dtype, attention: str, window: int | None = None
) -> Tensor:
    """The mask [1, 1, queries, keys] that transformers leaves out: no padding, every token sees itself and the past, or
    as much of it as a window holds."""
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (queries - keys < window)
    allowed = allowed[None, None]
    if attention == "sdpa":
        return allowed
    if attention == "eager":
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    raise ValueError(f"attention {attention!r}: the reference knows sdpa and eager")
