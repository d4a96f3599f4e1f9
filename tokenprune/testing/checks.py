"""The contract of a family, one function for each promise: it returns what holds in words, or raises.

A check raises `Wrong` where the pruned model is not exact, `UnsupportedModelError` where the family refuses by name,
and `NotTried` where the model or its inputs do not allow the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.attach import Attached, attach
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.adapter import Adapter
from tokenprune.testing.kinds import fixed, kept, kinds, recipe, stage
from tokenprune.testing.reference import masked_reference, vision_mask
from tokenprune.testing.runs import (
    TOLERANCE,
    generate_logits,
    logits_of,
    reference_stages,
    run_both,
    snapshot,
    stage_results,
    worst,
)

STEPS = 3
"""Tokens that each check generates: one of the prefill, one on its cache, one on what that has added."""

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {}),
    "beams": (3, {"num_beams": 3}),
    "sampling": (2, {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}),
}
"""Rows that `generate` makes of one, and what it is called with."""


class Wrong(AssertionError):
    """The pruned model does not give what it must."""


class NotTried(Exception):
    """The model, or what it is called with, does not allow the question."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and a batch of prompts with pictures for it."""

    model: Any
    batch: Mapping[str, Any]
    """What the model is called with: `input_ids`, `attention_mask` and the pictures."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """The same for each row alone, without padding; None: not known."""
    adapter: Adapter | None = None
    """None: that of the catalogue."""
    tolerance: float = TOLERANCE

    @property
    def layers(self) -> Any:
        return self.model.get_decoder().layers

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def vision(self) -> Tensor:
        """``[B, L]`` bool."""
        return vision_mask(self.model, self.batch["input_ids"])

    def attach(self, recipe: Any) -> Attached:
        return attach(self.model, recipe, adapter=self.adapter)

    def row(self, index: int) -> Mapping[str, Any]:
        """The inputs of one row alone."""
        if self.rows is None:
            raise NotTried("the inputs of each row alone are not known: give rows=[...]")
        return self.rows[index]


def everything_kept(subject: Subject) -> str:
    """``keep: 1.0`` is bit-identical, in generation and in one forward."""
    model, batch = subject.model, subject.batch
    plain, full = generate_logits(model, batch, max_new_tokens=STEPS), logits_of(model, batch)
    with subject.attach(kept(subject.depth)):
        again, whole = generate_logits(model, batch, max_new_tokens=STEPS), logits_of(model, batch)
    if not torch.equal(full, whole):
        raise Wrong(f"logits of a forward differ by {_number(full, whole)} though nothing is dropped")
    _same(plain, again, "though nothing is dropped")
    return "bit-identical logits, forward and generate"


def no_trace(subject: Subject) -> str:
    """Detaching leaves the model as it was."""
    model, batch = subject.model, subject.batch
    plain = generate_logits(model, batch, max_new_tokens=STEPS)  # some towers add hooks of their own at first
    before = snapshot(model)
    with subject.attach(kinds(subject.depth)["merging"]):
        generate_logits(model, batch, max_new_tokens=STEPS)
    after = snapshot(model)
    if after != before:
        changed = next(name for (name, a), (_, b) in zip(before, after, strict=True) if a != b)
        raise Wrong(f"attributes or hooks were left on {changed or 'the model'}")
    _same(plain, generate_logits(model, batch, max_new_tokens=STEPS), "after detach")
    return "no hooks or attributes left, bit-identical logits"


def equals_reference(subject: Subject, kind: Any, *, expand: int = 1, **options: Any) -> str:
    """Generation with a recipe equals that of the untouched model in which the dropped tokens are hidden.

    Args:
        subject: what is tested.
        kind: a recipe that drops something.
        expand: rows that `generate` makes of one.
        options: of `generate`.
    """
    difference, (got, expected), report = run_both(
        subject.model,
        subject.batch,
        kind,
        expand=expand,
        adapter=subject.adapter,
        max_new_tokens=STEPS,
        **options,
    )
    counts = report.vision_tokens[:, -1]
    if not bool((counts < torch.tensor(report.total)).all()):
        raise Wrong("nothing was dropped")
    if not difference < subject.tolerance:
        raise Wrong(f"logits differ by {difference:.1e} from the masked reference")
    if not torch.equal(got, expected):
        raise Wrong("the answer is another one than the masked reference's")
    return f"{report.total[0]} → {int(counts[0])} vision tokens, logits within {difference:.1e}"


def row_alone(subject: Subject) -> str:
    """A row of a batch keeps the tokens, and gives the logits, of the sample alone."""
    count = len(subject.batch["input_ids"])
    if count == 1:
        raise NotTried("the batch has one row: give two, with different prompts")
    mask = subject.batch.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise NotTried("rows are padded on the right, and generate needs padding on the left")
    with subject.attach(kinds(subject.depth)["merging"]) as attached:
        sequences, logits = generate_logits(subject.model, subject.batch, max_new_tokens=STEPS)
        together, most = attached.report.stages, 0.0
        for row in range(count):
            single, alone = generate_logits(subject.model, subject.row(row), max_new_tokens=STEPS)
            for one, both in zip(attached.report.stages, together, strict=True):
                if both.kept[row][both.kept[row] >= 0].tolist() != one.kept[0].tolist():
                    raise Wrong(f"row {row}: {one.name} keeps other tokens than in the sample alone")
            difference = worst(tuple(step[row : row + 1] for step in logits), alone)
            if not difference < subject.tolerance:
                raise Wrong(f"row {row}: logits differ by {difference:.1e} from those of the sample alone")
            if not torch.equal(sequences[row, -STEPS:], single[0, -STEPS:]):
                raise Wrong(f"row {row}: the answer is another one than the sample's alone")
            most = max(most, difference)
    return f"{count} rows keep the tokens of each alone, logits within {most:.1e}"


def second_turn(subject: Subject) -> str:
    """A second turn of text on the same cache equals the masked reference's."""
    model, batch, vision = subject.model, subject.batch, subject.vision
    words = batch["input_ids"][:, -4:]
    if bool(vision[:, -4:].any()):
        raise NotTried("the prompts end with a picture: let them end with four words")

    def two_turns() -> tuple[Tensor, ...]:
        first = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True)
        name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        turn = _next_turn(batch, torch.cat([first.sequences, words], dim=1))
        return generate_logits(model, {**turn, name: getattr(first, name)}, max_new_tokens=STEPS)[1]

    with subject.attach(kinds(subject.depth)["merging"]) as attached, stage_results(attached) as results:
        logits = two_turns()
    with masked_reference(model, vision, reference_stages(attached.report, results)):
        expected = two_turns()
    difference = worst(logits, expected)
    if not difference < subject.tolerance:
        raise Wrong(f"logits of the second turn differ by {difference:.1e} from the masked reference")
    if attached.report.prefills != 1:
        raise Wrong(f"{attached.report.prefills} forwards were taken for prompts with pictures, of one")
    return f"logits within {difference:.1e}"


def prompt_lookup(subject: Subject) -> str:
    """Prompt-lookup decoding, which reads candidates with the prompt and crops the cache, gives the greedy answer."""
    model = subject.model
    batch = subject.batch if len(subject.batch["input_ids"]) == 1 else subject.row(0)
    options: dict[str, Any] = {"do_sample": False, "prompt_lookup_num_tokens": 3}
    try:
        model.generate(**batch, max_new_tokens=1, **options)
    except ValueError as error:
        raise UnsupportedModelError(f"transformers: {error}") from None
    with subject.attach(kinds(subject.depth)["merging"]):
        greedy = model.generate(**batch, max_new_tokens=8, do_sample=False)
        looked_up = model.generate(**batch, max_new_tokens=8, **options)
    if not torch.equal(greedy, looked_up):
        raise Wrong(f"the answer {looked_up[0, -8:].tolist()} is not the greedy one {greedy[0, -8:].tolist()}")
    return "the greedy answer"


def rater_attention(subject: Subject, eager: Any = None) -> str:
    """What raters read is what eager attention gives, at layers of any type.

    Args:
        subject: what is tested.
        eager: the same model with eager attention; by default the model itself is switched to it for a forward.
    """
    vision = subject.vision
    attentions = _eager_attentions(subject, eager)
    read = [index for index in attentions if index < min(5, subject.depth - 1)]
    most = 0.0
    for row in read:
        for source, place in (("previous", row + 1), ("next", row)):
            scorer = {"type": "attention", "layer": source}
            asked = recipe("rows", stage(place, fixed(0.5), raters="last_text", scorer=scorer))
            with subject.attach(asked) as attached:
                logits_of(subject.model, subject.batch)
                scores = attached.report.stages[0].scores
            assert scores is not None  # half of the tokens are dropped
            for b, own in enumerate(vision):
                expected = attentions[row][b, :, -1, own].mean(0)  # padding stands on the left: the last is a word
                difference = float((scores[b, : len(expected)] - expected).abs().max())
                most = max(most, difference)
                if not difference < subject.tolerance:
                    raise Wrong(f"layer {row}, read by {source!r}: scores differ by {difference:.1e} from eager's")
    return f"layers {', '.join(map(str, read))} as eager attention has them, within {most:.1e}"


def _eager_attentions(subject: Subject, eager: Any) -> dict[int, Tensor]:
    """``[B, H, L, L]`` of each layer that has attention, from a forward of the untouched model."""
    with_attention = [index for index, layer in enumerate(subject.layers) if hasattr(layer, "self_attn")]
    model = subject.model if eager is None else eager
    try:
        with _eager(model), torch.no_grad():
            found = model(**subject.batch, output_attentions=True).attentions
    except (AttributeError, TypeError, ValueError) as error:
        raise NotTried(f"the model gives no eager attention: {type(error).__name__}: {error}") from None
    if not found or found[0] is None or len(found) != len(with_attention):
        raise NotTried("the model gives no eager attention of each layer for output_attentions=True")
    return dict(zip(with_attention, found, strict=True))


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Eager attention in all modules that have a configuration of their own, until the block ends."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation = before[key]


def in_rows(subject: Subject) -> Subject:
    """The subject with the inputs of each row alone, where they can be told: every input has one entry a row."""
    ids, mask = subject.batch["input_ids"], subject.batch.get("attention_mask")
    tensors = [value for value in subject.batch.values() if isinstance(value, Tensor)]
    if subject.rows is not None or any(value.shape[:1] != ids.shape[:1] for value in tensors):
        return subject
    rows: list[dict[str, Any]] = []
    for row in range(len(ids)):
        real = slice(None) if mask is None else mask[row].bool()
        rows.append(
            {
                name: value[row : row + 1, real] if value.shape == ids.shape else value[row : row + 1]
                for name, value in subject.batch.items()
                if isinstance(value, Tensor)
            }
        )
    return replace(subject, rows=rows)


def _next_turn(batch: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Inputs of a later turn of text, of `ids` ``[B, longer]``: what has an entry a token grows with them."""
    grown = ids.shape[1] - batch["input_ids"].shape[1]
    found: dict[str, Any] = {"input_ids": ids}
    for name, value in batch.items():
        if name != "input_ids" and isinstance(value, Tensor) and value.shape == batch["input_ids"].shape:
            found[name] = torch.nn.functional.pad(value, (0, grown), value=int(name == "attention_mask"))
    return found


def _same(first: tuple[Tensor, tuple[Tensor, ...]], second: tuple[Tensor, tuple[Tensor, ...]], where: str) -> None:
    """Raise `Wrong` unless two answers are bit-identical."""
    if len(first[1]) != len(second[1]) or not all(map(torch.equal, first[1], second[1])):
        raise Wrong(f"logits of generate differ by {worst(first[1], second[1]):.1e} {where}")
    if not torch.equal(first[0], second[0]):
        raise Wrong(f"the answer is another one {where}")


def _number(first: Tensor, second: Tensor) -> str:
    return "their shape" if first.shape != second.shape else f"{(first - second).abs().max().item():.1e}"
