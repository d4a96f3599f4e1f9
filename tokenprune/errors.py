"""Errors that users can cause, and the wording they share: where, what was got, what was expected, the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TokenPruneError(Exception):
    """Base of all errors raised on purpose by tokenprune."""


class RecipeError(TokenPruneError):
    """A recipe cannot be read, is not valid, or does not fit the model."""

    problems: Sequence[object] = ()
    """All that is wrong with it, each with its place in the text; empty where there is no text to point at."""


class BudgetError(TokenPruneError):
    """A budget is out of range, or no schedule of this recipe can meet it."""


class InputError(TokenPruneError):
    """Tensors, pictures or arguments given to a call do not fit what it needs."""


class UnstatedCostWarning(UserWarning):
    """A budget of multiply-adds is solved for a recipe with a part that does not state its own."""


class PluginWarning(UserWarning):
    """An installed package brings parts that cannot be used; recipes that name none of them are not harmed."""


class UnprunedWarning(UserWarning):
    """A forward ran as if nothing were attached, because nothing told where its vision tokens stand."""


class UnsupportedModelError(TokenPruneError):
    """The model, its cache or the way it is called is not supported."""


class NotFiredError(TokenPruneError):
    """Stages were attached but did not run, so there is nothing to report."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``" (did you mean 'cluster'?)"``, or an empty string when no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
