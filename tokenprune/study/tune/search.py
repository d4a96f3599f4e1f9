"""`tune`: the best recipe of a space on one half of the pictures, reported on the other half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenprune.budget import Budget, BudgetKind
from tokenprune.errors import BudgetError, InputError, RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.families.chat import Chat
from tokenprune.recipe import Recipe
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import (
    Condition,
    Evaluation,
    Request,
    Respondent,
    Response,
    agreement,
    evaluate_on,
    make_conditions,
)
from tokenprune.study.tune.halves import halves
from tokenprune.study.tune.proposals import propose
from tokenprune.study.tune.result import GIVEN, WINNER, Candidate, Skipped, Tuned
from tokenprune.study.tune.space import Space, default_space
from tokenprune.study.workers import Alone, Workers

ASKS = 50
"""Combinations looked at for each one that can run; a space with fewer that can is given up."""


def tune(
    model: Any,
    processor: Any,
    cases: Sequence[Case],
    space: Space | None = None,
    *,
    average: float | None = None,
    flops: float | None = None,
    trials: int = 40,
    seed: int = 0,
    agree: bool = False,
    draws: int = 5,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    packed: bool = False,
    output: Path | None = None,
    on_trial: Callable[[int, int], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Search `space` for the recipe with the most right answers at a budget, and say how it does on other pictures.

    The recipe as it is given is tried first. Half of the pictures are chosen on; on the other half the winner runs
    beside that recipe, the baselines and a smaller image. The same arguments give the same result.

    Args:
        model: a supported model, on its device and in evaluation mode, with nothing attached.
        processor: the processor that belongs to it.
        cases: about two pictures at least.
        space: from `make_space` or `read_space`; one stage of shipped parts when left out.
        average: the budget of all: vision tokens in a layer, mean over all layers, as a count or a share.
        flops: or a share of the untouched prefill's multiply-adds. One of the two.
        trials: recipes that are tried beside the one given; no more than the space has.
        seed: of the halves, and of the search.
        agree: count answers that are the untouched model's, instead of right ones.
        draws: of what is random, in the report; while choosing, one.
        batch_size: questions at a time.
        max_new_tokens: longest answer, in tokens.
        packed: see `evaluate`.
        output: folder that keeps every batch; a later call with the same arguments, or with more trials, goes on there.
        on_trial: called with recipes tried and how many there will be at most.
        on_batch: called with batches done and batches in all, of the report.

    Raises:
        InputError: nothing can run at this budget, a wrong argument, or Optuna is missing where a search is asked for.
        BudgetError: not exactly one budget, or one out of range.
        TokenPruneError: whatever `evaluate` raises of the cases.
    """
    respondent = Respondent(Chat("", model, processor))
    return tune_on(
        Alone(lambda *_: respondent),
        cases,
        space,
        average=average,
        flops=flops,
        trials=trials,
        seed=seed,
        agree=agree,
        draws=draws,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        packed=packed,
        output=output,
        on_trial=on_trial,
        on_batch=on_batch,
    )


def tune_on(
    workers: Workers[Request, Response],
    cases: Sequence[Case],
    space: Space | None = None,
    *,
    average: float | None = None,
    flops: float | None = None,
    trials: int = 40,
    seed: int = 0,
    agree: bool = False,
    draws: int = 5,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    packed: bool = False,
    output: Path | None = None,
    on_trial: Callable[[int, int], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tuned:
    """As `tune`, on workers that have the model: the same result, however many they are.

    The batches of one recipe are shared out, not the recipes: which one is tried next, the answers to those before it
    tell.

    Args:
        workers: entered; see `evaluate_on`.
        cases: see `tune`; the other arguments too.

    Raises:
        TokenPruneError: as `tune`.
    """
    budget = _budget(average, flops)
    if trials < 1:
        raise InputError(f"trials: expected at least 1, got {trials}")
    space = default_space() if space is None else space
    choosing, reporting = halves(cases, seed)
    with nullcontext(output) if output is not None else TemporaryDirectory() as folder:

        def asked(conditions: Sequence[Condition], of: Sequence[Case], **more: Any) -> Evaluation:
            result = evaluate_on(
                workers,
                of,
                conditions,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                packed=packed,
                output=Path(folder),
                **more,
            )
            return agreement(result) if agree else result

        def runs(recipe: Recipe) -> None:
            """Raise unless it fits the model: one question, of which nothing is kept."""
            evaluate_on(workers, choosing[:1], _alone(recipe, budget), max_new_tokens=1, packed=packed)

        asked([], choosing)  # what is wrong with the questions is told before any recipe is blamed for it
        search = _Search(space, budget, runs, lambda recipe: asked(_alone(recipe, budget), choosing))
        search.run(trials, seed, on_trial)
        winner, given = search.best, search.given
        recipes = [winner.recipe.model_copy(update={"name": WINNER})]
        if given is not None and given.recipe.fingerprint != winner.recipe.fingerprint:
            name = GIVEN if given.recipe.name == WINNER else given.recipe.name
            recipes.append(given.recipe.model_copy(update={"name": name}))
        report = asked(make_conditions(recipes, [budget], draws=draws), reporting, on_batch=on_batch)
    method = "all combinations" if space.size <= trials else f"Optuna's TPE, seed {seed}, {space.size} combinations"
    return Tuned(space, budget, seed, search.candidates, search.skipped, choosing, report, method)


class _Search:
    """Recipes tried one after the other, each once."""

    def __init__(
        self,
        space: Space,
        budget: Budget,
        runs: Callable[[Recipe], None],
        ask: Callable[[Recipe], Evaluation],
    ) -> None:
        self.candidates: list[Candidate] = []
        self.skipped: list[Skipped] = []
        self._space, self._budget, self._runs, self._ask = space, budget, runs, ask
        self._known: dict[str, float | None] = {}

    @property
    def given(self) -> Candidate | None:
        """The recipe as it was given, if it can run."""
        return next((each for each in self.candidates if not each.choices), None)

    @property
    def best(self) -> Candidate:
        """As `Tuned.winner`."""
        return min(self.candidates, key=lambda each: (-each.right.value, each.flops_share, each.number))

    def run(self, trials: int, seed: int, on_trial: Callable[[int, int], None] | None) -> None:
        """Try the recipe as given, then up to `trials` others."""
        most = min(trials, self._space.size) + 1
        self._look({})
        proposals = propose(self._space, trials, seed)
        labels = next(proposals, None)
        for _ in range(ASKS * most):
            if on_trial is not None:
                on_trial(len(self.candidates), most)
            if labels is None or len(self.candidates) - (self.given is not None) >= trials:
                break
            try:
                labels = proposals.send(self._look(labels))
            except StopIteration:
                labels = None
        if not self.candidates:
            few = dict.fromkeys(each.reason for each in self.skipped)
            raise InputError(f"tune: no recipe of this space can run at {self._budget}:\n" + "\n".join([*few][:3]))

    def _look(self, labels: dict[str, str]) -> float | None:
        """How good a combination is; None where it cannot run."""
        try:
            recipe = self._space.recipe(labels, self._budget)
            if recipe.fingerprint in self._known:
                return self._known[recipe.fingerprint]
            self._known[recipe.fingerprint] = None
            self._runs(recipe)
        except TokenPruneError as error:
            self._skip(labels, error)
            return None
        try:
            row = self._ask(recipe).rows[1]
        except (BudgetError, RecipeError, UnsupportedModelError) as error:  # not a full disk
            self._skip(labels, error)
            return None
        number = len(self.candidates) + (self.given is None and bool(labels))
        self.candidates.append(Candidate(number, labels, recipe, row.overall, row.average, row.flops_share))
        self._known[recipe.fingerprint] = row.overall.value
        return row.overall.value

    def _skip(self, labels: dict[str, str], error: TokenPruneError) -> None:
        self.skipped.append(Skipped(labels, str(error).splitlines()[0]))


def _alone(recipe: Recipe, budget: Budget) -> list[Condition]:
    return make_conditions([recipe], [budget], draws=1, baselines=False)


def _budget(average: float | None, flops: float | None) -> Budget:
    given: dict[BudgetKind, float] = {}
    if average is not None:
        given["average"] = average
    if flops is not None:
        given["flops"] = flops
    if len(given) != 1:
        raise BudgetError(f"tune: expected one budget, average or flops, got {' and '.join(given) or 'none'}")
    ((kind, value),) = given.items()
    return Budget(kind, value)
