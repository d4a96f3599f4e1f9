"""`check_family`: the contract that every family is held to, on a model of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tokenprune.errors import InputError, TokenPruneError, UnsupportedModelError
from tokenprune.families.adapter import Adapter
from tokenprune.families.anatomy import anatomy
from tokenprune.testing.checks import (
    CACHES,
    MODES,
    NotTried,
    Subject,
    Wrong,
    equals_reference,
    everything_kept,
    in_rows,
    no_trace,
    prompt_lookup,
    rater_attention,
    row_alone,
    second_turn,
)
from tokenprune.testing.kinds import kinds
from tokenprune.testing.runs import TOLERANCE, generate_logits, logits_of

Outcome = Literal["holds", "refused", "not tried", "wrong"]
_MARKS: dict[Outcome, str] = {"holds": "✓", "refused": "–", "not tried": "?", "wrong": "✗"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    outcome: Outcome
    words: str
    """What holds, and how well; or what is wrong, refused or missing."""

    def __str__(self) -> str:
        told = self.words if self.outcome in ("holds", "wrong") else f"{self.outcome}: {self.words}"
        return f"{_MARKS[self.outcome]} {self.check:<20} {told}"


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """What `check_family` found, one `Finding` for each check."""

    title: str
    """The model and its family."""
    all: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: each check holds, is refused by name, or could not be tried."""
        return not any(finding.outcome == "wrong" for finding in self.all)

    def of(self, outcome: Outcome) -> tuple[str, ...]:
        """The names of the checks with this outcome."""
        return tuple(finding.check for finding in self.all if finding.outcome == outcome)

    def __getitem__(self, index: Any) -> Any:
        return self.all[index]

    def __len__(self) -> int:
        return len(self.all)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of(outcome))} {outcome}" for outcome in _MARKS if self.of(outcome))
        return "\n".join([self.title, *map(str, self.all), counts])


def check_family(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    adapter: Adapter | None = None,
    tolerance: float = TOLERANCE,
) -> Findings:
    """Run the contract of a family on a model of your own, print what holds, and return it.

    Recipes of five kinds, generation with each cache and mode, a second turn and prompt lookup are held against the
    masked reference: the same model, whole, in which the dropped tokens are hidden by the attention mask. ``keep: 1.0``
    and the model after detach must be bit-identical, a row of a batch must equal the sample alone, and what raters read
    must be what eager attention gives. Use a small model in float32 on the CPU; the weights may be random, as long as
    its answers depend on the picture.

    Args:
        model: a transformers model, or one with the same methods; in evaluation mode, weights in float32.
        inputs: what it is called with: a batch of `input_ids` ``[B, L]`` with pictures, padded on the left with an
            `attention_mask`. Two rows with texts, or pictures, of different length ask the most.
        rows: the same of each row alone, without padding. They are told from `inputs` where each of its tensors has
            one entry a row.
        adapter: of a family that no package has registered, as for `attach`.
        tolerance: largest difference of logits; float32 of a small model stays below the default.

    Raises:
        InputError: the inputs hold no vision tokens, or the weights are not float32.
        UnsupportedModelError: no adapter knows the model, or `adapter` is not one for it.
    """
    parts = anatomy(model, adapter)
    model = parts.model
    subject = _checked(Subject(model, inputs, rows, parts.adapter, tolerance))
    family = f"{parts.adapter.title} ({parts.adapter.family})"
    title = f"{type(model).__name__}, {family}: {subject.depth} layers, input_ids {list(inputs['input_ids'].shape)}"
    with torch.no_grad():
        found = Findings(title, tuple(_found(name, check, subject) for name, check in _checks(subject).items()))
    print(found)
    return found


def _checks(subject: Subject) -> dict[str, Callable[[Subject], str]]:
    """Name to check, in the order of the table."""
    made = kinds(subject.depth)
    found: dict[str, Callable[[Subject], str]] = {
        "vision tokens": _counts,
        "keep 1.0": _able(everything_kept),
        "detach": _able(no_trace),
        **{f"recipe {name}": _able(partial(equals_reference, kind=made[name])) for name in made},
        "rater attention": rater_attention,
    }
    merging = partial(equals_reference, kind=made["merging"])
    for name, options in CACHES.items():
        if name != "dynamic":
            found["no cache" if name == "none" else f"{name} cache"] = _able(partial(merging, **options), **options)
    for name, (expand, options) in MODES.items():
        if name != "greedy":
            found[name] = _able(partial(merging, expand=expand, **options), **options)
    later = {"row alone": row_alone, "second turn": second_turn, "prompt lookup": prompt_lookup}
    return found | {name: _able(check) for name, check in later.items()}


def _able(check: Callable[[Subject], str], **options: Any) -> Callable[[Subject], str]:
    """The check, where the untouched model can generate with these options."""

    def checked(subject: Subject) -> str:
        try:
            generate_logits(subject.model, subject.batch, max_new_tokens=1, **options)
        except Exception as error:  # of the model itself, whatever it is
            raise NotTried(f"the untouched model raises {_told(error)}") from None
        return check(subject)

    return checked


def _told(error: Exception) -> str:
    """An error of another in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _found(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    """What a check says, in a word."""
    try:
        return Finding(name, "holds", check(subject))
    except Wrong as error:
        return Finding(name, "wrong", str(error))
    except UnsupportedModelError as error:
        return Finding(name, "refused", str(error))
    except NotTried as error:
        return Finding(name, "not tried", str(error))
    except TokenPruneError as error:
        return Finding(name, "wrong", str(error))
    except Exception as error:  # whatever a model of another makes of a call is a finding, and the other checks go on
        return Finding(name, "wrong", _told(error))


def _counts(subject: Subject) -> str:
    """The answers depend on the picture, and the adapter tells the grids of pictures."""
    model, batch, vision = subject.model, subject.batch, subject.vision
    full = logits_of(model, batch)
    with subject.attach(kinds(subject.depth)["deep"] | {"name": "seen"}) as attached:
        moved = float((logits_of(model, batch)[:, -1] - full[:, -1]).abs().max())
    if attached.report.total != tuple(vision.sum(1).tolist()):
        raise Wrong(f"{attached.report.total} vision tokens were found, of {tuple(vision.sum(1).tolist())}")
    if moved < 10 * subject.tolerance:
        raise Wrong(
            f"dropping vision tokens moves the logits by {moved:.1e}: equality would show nothing here; take weights "
            "that make the answer depend on the picture"
        )
    return f"{' and '.join(map(str, attached.report.total))}; hiding most of them moves the logits by {moved:.1e}"


def _checked(subject: Subject) -> Subject:
    """The subject, with the inputs of each row alone where they can be told."""
    ids = subject.batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise InputError("check_family: inputs have no input_ids [B, L]")
    for row, count in enumerate(subject.vision.sum(1).tolist()):
        if count < 8:
            raise InputError(f"check_family: row {row} of input_ids has {count} vision tokens; expected at least 8")
    dtype = next(subject.model.parameters()).dtype
    if dtype != torch.float32:
        raise InputError(f"check_family: weights are {dtype}; expected torch.float32, where equality can be told")
    if subject.depth < 2:
        raise InputError("check_family: the decoder has one layer; expected two or more")
    if subject.rows is not None and len(subject.rows) != len(ids):
        raise InputError(f"check_family: {len(subject.rows)} rows for a batch of {len(ids)}")
    return in_rows(subject)
