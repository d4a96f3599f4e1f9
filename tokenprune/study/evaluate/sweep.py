"""`evaluate`: a sweep of all conditions over all cases, in batches, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenprune.engine.attach import attach
from tokenprune.errors import BudgetError, InputError, TokenPruneError
from tokenprune.families.chat import Chat
from tokenprune.study.cases import Case
from tokenprune.study.evaluate.askers import Asker, GenerateAsker
from tokenprune.study.evaluate.asking import ask, model_key
from tokenprune.study.evaluate.conditions import UNTOUCHED, Condition, share_of
from tokenprune.study.evaluate.cost import Meter
from tokenprune.study.evaluate.journal import Batch, Journal
from tokenprune.study.evaluate.packing import PackedAsker
from tokenprune.study.evaluate.results import Evaluation, Outcome


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
    _check_cases(cases, batch_size)
    conditions = [UNTOUCHED, *(c for c in conditions if c.kind != "untouched")]
    _check_fit(model, conditions)
    chat, meter = Chat("", model, processor), Meter(model)
    _check_processor(chat, cases)
    asker: Asker = PackedAsker(chat) if packed else GenerateAsker(chat)
    batches = list(asker.batches(cases, batch_size))
    journal = Journal(output)
    run_key = f"{model_key(chat)} {max_new_tokens}"
    done, everything = 0, len(batches) * len(conditions)
    totals: list[list[int]] = []
    outcomes: list[Outcome] = []
    for condition in conditions:
        results: dict[int, tuple[Batch, int]] = {}
        shares = _shares(condition, cases, outcomes)
        for number, order in enumerate(batches):
            chosen = [cases[i] for i in order]
            key = _key(run_key, condition, chosen)
            batch = journal.get(key)
            if batch is None:
                known = totals[number] if condition.kind != "untouched" else None
                batch = ask(
                    asker,
                    chosen,
                    condition,
                    meter=meter,
                    totals=known,
                    shares=None if shares is None else [shares[i] for i in order],
                    max_new_tokens=max_new_tokens,
                )
                journal.add(key, condition.label, batch)
            if condition.kind == "untouched":
                totals.append(batch.total)
            results |= {index: (batch, place) for place, index in enumerate(order)}
            done += 1
            if on_batch is not None:
                on_batch(done, everything)
        outcomes.append(_outcome(condition, cases, results))
    return Evaluation(list(cases), outcomes)


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


def _check_processor(chat: Chat, cases: Sequence[Case]) -> None:
    """Make every prompt, and show the processor a picture of each size: what it refuses ends nothing half-way."""
    problems: list[str] = []
    pictures: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for case in cases:
        try:
            prompt = chat.prompt(case.question, 1)
            if case.picture_id in pictures:
                continue
            pictures.add(case.picture_id)
            picture = case.picture()
            if picture.size not in taken:
                chat.process([[picture]], [prompt])
                taken.add(picture.size)
        except InputError as error:
            problems.append(f"{case.where or case.picture_id}: error: {error}")
    if problems:
        raise InputError("\n".join(problems))


def _check_fit(model: Any, conditions: Sequence[Condition]) -> None:
    """Put every recipe on the model and take it off again."""
    problems: dict[str, type[TokenPruneError]] = {}
    for condition in conditions:
        if condition.recipe is None:
            continue
        try:
            attach(model, condition.recipe).detach()
        except TokenPruneError as error:
            problems.setdefault(f"{condition.label}: {str(error).removeprefix(f'{condition.label}: ')}", type(error))
    if problems:
        kind = BudgetError if set(problems.values()) == {BudgetError} else InputError
        raise kind("\n".join(problems))


def _key(run_key: str, condition: Condition, cases: Sequence[Case]) -> str:
    words = [run_key, condition.fingerprint, *(case.key for case in cases)]
    return sha256(" ".join(words).encode()).hexdigest()[:16]


def _outcome(condition: Condition, cases: Sequence[Case], results: dict[int, tuple[Batch, int]]) -> Outcome:
    found = [results[index] for index in range(len(cases))]
    answers = [batch.answers[place] for batch, place in found]
    return Outcome(
        condition,
        answers=answers,
        right=[case.right(answer) for case, answer in zip(cases, answers, strict=True)],
        total=[batch.total[place] for batch, place in found],
        average=[batch.average[place] for batch, place in found],
        final=[batch.final[place] for batch, place in found],
        flops=[batch.flops[place] for batch, place in found],
        seconds=sum(batch.seconds for batch in {id(batch): batch for batch, _ in found}.values()),
    )
