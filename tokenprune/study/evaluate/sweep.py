"""`evaluate`: a sweep of all conditions over all cases, in batches, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.families.chat import Chat
from tokenprune.study.cases import Case
from tokenprune.study.evaluate.askers import GenerateAsker
from tokenprune.study.evaluate.conditions import UNTOUCHED, Condition, share_of
from tokenprune.study.evaluate.journal import Batch, Journal
from tokenprune.study.evaluate.packing import PackedAsker
from tokenprune.study.evaluate.respondent import Ask, Check, Request, Respondent, Response
from tokenprune.study.evaluate.results import Evaluation, Outcome
from tokenprune.study.workers import Alone, Workers


def evaluate(
    model: Any,
    processor: Any,
    cases: Sequence[Case],
    conditions: Sequence[Condition],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    packed: bool = False,
    output: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask `model` all `cases` under all `conditions`, greedily, and compare the answers.

    The untouched model always runs first, whether it is among the conditions or not. All conditions get the same
    batches, and the same arguments give the same answers.

    Args:
        model: a supported model, on its device and in evaluation mode, with nothing attached.
        processor: the processor that belongs to it.
        cases: at least one; a question may not come twice about the same picture.
        conditions: from `make_conditions`.
        batch_size: questions at a time. On some devices another size may change the last digits, and so an answer.
        max_new_tokens: longest answer, in tokens.
        packed: run what questions about one picture share once for all of them, instead of `model.generate` for each:
            the same answers, sooner. For models of the LLaVA-1.5 family. Recipes with ``kv: all_layers``, whose
            questions cannot share caches, are asked by `model.generate` all the same.
        output: folder that keeps each batch when it is done; a later call with the same arguments goes on from there.
        on_batch: called with batches done and batches in all.

    Raises:
        UnsupportedModelError: `packed`, and the model cannot be asked so; the message says why.
        TokenPruneError: a condition does not fit the model, all of them told at once; nothing has been generated then.
        InputError: no cases, a case twice, a question or a picture that the processor refuses (all of them told, each
            with its place), or an output folder that cannot be used.
    """
    respondent = Respondent(Chat("", model, processor))
    return evaluate_on(
        Alone(lambda *_: respondent),
        cases,
        conditions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        packed=packed,
        output=output,
        on_batch=on_batch,
    )


def evaluate_on(
    workers: Workers[Request, Response],
    cases: Sequence[Case],
    conditions: Sequence[Condition],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    packed: bool = False,
    output: Path | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """As `evaluate`, with batches shared out to workers that have the model: the same result, however many they are.

    Args:
        workers: entered; each a `Respondent` on the same model.
        cases: see `evaluate`; the other arguments too. Pictures are opened where the workers run.

    Raises:
        TokenPruneError: as `evaluate`.
    """
    _check_cases(cases, batch_size)
    conditions = [UNTOUCHED, *(c for c in conditions if c.kind != "untouched")]
    list(workers.answers([Check(cases, conditions, packed)]))
    batches = list((PackedAsker if packed else GenerateAsker).batches(cases, batch_size))
    journal = Journal(output)
    found: dict[tuple[int, int], Batch] = {}
    outcomes: dict[int, Outcome] = {}
    # Smaller images come last: how small they are, others' outcomes tell.
    for last in (False, True):
        now = [index for index, each in enumerate(conditions) if (each.kind == "smaller-image") == last]
        asked: dict[str, tuple[Ask, list[tuple[int, int]]]] = {}
        for index in now:
            shares = _shares(conditions[index], cases, [outcomes[each] for each in sorted(outcomes)])
            for number, order in enumerate(batches):
                request = Ask(
                    conditions[index],
                    [cases[i] for i in order],
                    totals=found[0, number].total if last else None,
                    shares=None if shares is None else [shares[i] for i in order],
                    packed=packed,
                    max_new_tokens=max_new_tokens,
                )
                asked.setdefault(_key(workers.run, request), (request, []))[1].append((index, number))
        for key, batch in _answers(workers, journal, {key: request for key, (request, _) in asked.items()}):
            for place in asked[key][1]:
                found[place] = batch
                if on_batch is not None:
                    on_batch(len(found), len(batches) * len(conditions))
        for index in now:
            outcomes[index] = _outcome(
                conditions[index], cases, batches, [found[index, n] for n in range(len(batches))]
            )
    return Evaluation(list(cases), [outcomes[index] for index in range(len(conditions))])


def _answers(
    workers: Workers[Request, Response], journal: Journal, asked: Mapping[str, Ask]
) -> Iterator[tuple[str, Batch]]:
    """(key, batch) for each request: first those that were done before, then the others as they are done."""
    left = [key for key in asked if journal.get(key) is None]
    for key in asked:
        batch = journal.get(key)
        if batch is not None:
            yield key, batch
    for number, made in workers.answers([asked[key] for key in left]):
        assert isinstance(made, Batch)
        journal.add(left[number], asked[left[number]].condition.label, made)
        yield left[number], made


def _shares(condition: Condition, cases: Sequence[Case], outcomes: Sequence[Outcome]) -> list[float] | None:
    """Of its pixels that a smaller image keeps: as many as the budget leaves tokens; None for other conditions.

    How many tokens a share of multiply-adds leaves depends on the prompt. There a picture gets as many as `uniform`
    kept of it at that budget, the fewest of all questions about it.
    """
    budget = condition.budget
    if condition.kind != "smaller-image" or budget is None:
        return None
    if budget.kind != "flops":
        return [share_of(budget, total) for total in outcomes[0].total]
    (even, *_) = [o for o in outcomes if o.condition.label == "uniform" and o.condition.budget == budget]
    fewest: dict[str, float] = {}
    for case, kept, total in zip(cases, even.final, even.total, strict=True):
        fewest[case.picture_id] = min(kept / max(total, 1), fewest.get(case.picture_id, 1.0))
    return [fewest[case.picture_id] for case in cases]


def _check_cases(cases: Sequence[Case], batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size: expected at least 1, got {batch_size}")
    if not cases:
        raise InputError("no questions to ask")
    seen: set[str] = set()
    for case in cases:
        if case.key in seen:
            raise InputError(f"asked twice about {case.picture_id}: {case.question!r}")
        seen.add(case.key)


def _key(run: str, asked: Ask) -> str:
    words = [f"{run} {asked.max_new_tokens}", asked.condition.fingerprint, *(case.key for case in asked.cases)]
    return sha256(" ".join(words).encode()).hexdigest()[:16]


def _outcome(
    condition: Condition, cases: Sequence[Case], batches: Sequence[Sequence[int]], results: Sequence[Batch]
) -> Outcome:
    of = {
        index: (batch, place)
        for batch, order in zip(results, batches, strict=True)
        for place, index in enumerate(order)
    }
    found = [of[index] for index in range(len(cases))]
    answers = [batch.answers[place] for batch, place in found]
    return Outcome(
        condition,
        answers=answers,
        right=[case.right(answer) for case, answer in zip(cases, answers, strict=True)],
        total=[batch.total[place] for batch, place in found],
        average=[batch.average[place] for batch, place in found],
        final=[batch.final[place] for batch, place in found],
        flops=[batch.flops[place] for batch, place in found],
        seconds=sum(batch.seconds for batch in results),
    )
