"""Which combination is tried next: all in order where that is feasible, else what Optuna proposes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from tokenprune.errors import InputError
from tokenprune.study.tune.space import Labels, Space, draw

PATIENCE = 10
"""Proposals in a row that were made before, after which an untried combination is drawn at random."""

Proposals = Generator[dict[str, str], float | None, None]
"""Yields what to try, each combination once; is sent how good it was, or None where it cannot run."""


def propose(space: Space, trials: int, seed: int) -> Proposals:
    """Every combination in order where there are at most `trials`, else those that a search proposes."""
    return every(space) if space.size <= trials else searched(space, seed)


def every(space: Space) -> Proposals:
    """All combinations in order."""
    yield from space.combinations()


def searched(space: Space, seed: int) -> Proposals:
    """What a tree-structured Parzen estimator proposes (Bergstra et al. 2011, as Optuna has it), until all were tried.

    The same seed and the same answers give the same proposals, so a search goes on by being told all again.

    Raises:
        InputError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(
            f"a search among {space.size} combinations needs Optuna: pip install 'tokenprune-vlm[tune]'; "
            f"without it, --trials {space.size} tries them all"
        ) from None
    with _quiet():
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    untried = draw(space, seed)
    told: dict[tuple[str, ...], float | None] = {}
    again = 0
    while len(told) < space.size:
        if again >= PATIENCE:
            study.enqueue_trial(next(labels for labels in untried if _key(labels) not in told))
        trial = study.ask()
        labels = {choice.name: trial.suggest_categorical(choice.name, list(choice.values)) for choice in space.choices}
        if _key(labels) in told:
            again, value = again + 1, told[_key(labels)]
        else:
            again, value = 0, (yield labels)
            told[_key(labels)] = value
        if value is None:  # the search takes what was pruned for worse than all else
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)


def _key(labels: Labels) -> tuple[str, ...]:
    return tuple(labels.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says what study it makes, on stderr; not here."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
