"""What every part shares: settings that its constructor's signature declares, and a `repr` that says them."""

from __future__ import annotations

import inspect
import re
from abc import ABC
from functools import cache
from typing import Any, ClassVar, NamedTuple, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import nn

from tokenprune.core.needs import Needs
from tokenprune.errors import InputError
from tokenprune.parts.work import Work

NOTHING = Needs()


class Draws(NamedTuple):
    """Runs of a part that differ by chance alone."""

    setting: str
    """The constructor's argument, counted from 0."""
    most: int | None
    """How many values it has; None: any number."""


class Part(nn.Module, ABC):
    """Base of all parts. Subclasses keep each constructor argument as an attribute of the same name."""

    role: ClassVar[str]
    """Its role in a stage: one of `tokenprune.registry.ROLES`."""
    suffix: ClassVar[str]
    """The role's ending in class names, left off in the registered name."""

    def __init__(self) -> None:  # nn.Module's takes anything, and would stand in for parts without settings
        super().__init__()
        self.title = f"{self.role} {self.name()!r}"
        """Role and name, as messages call it: ``scorer 'attention'``. Text from here on, since no graph can make it."""

    @property
    def reads(self) -> Needs:
        """What `forward` reads beside the tokens that enter the stage; a class may state it as an attribute.

        The engine records what the parts of a recipe read together, and nothing else. A part that reads more than it
        declares raises.
        """
        return NOTHING

    @property
    def draws(self) -> Draws | None:
        """The setting that chance hangs on, and how many distinct runs it gives; None for a part without any.

        Evaluation averages over them, so that a lucky draw does not pass for a method.
        """
        return None

    @classmethod
    def name(cls) -> str:
        """Registered name: the class name in snake_case without its role (`RankRatioScheduler` is ``rank_ratio``)."""
        stem = cls.__name__.removesuffix(cls.suffix)
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, as given or defaulted."""
        return {key: getattr(self, key) for key in inspect.signature(type(self)).parameters}

    def check(self) -> None:
        """Hold the settings against their annotated limits; constructors with arguments call it last.

        Raises:
            InputError: a setting of the wrong type or out of range; all of them are named.
        """
        try:
            settings_model(type(self))(**self.settings())
        except ValidationError as error:
            wrong: dict[str, list[str]] = {}
            for problem in error.errors():  # a value that fits no side of a union has one problem for each
                wrong.setdefault(str(problem["loc"][0]), []).append(problem["msg"].removeprefix("Input "))
            told = "; ".join(f"{key}={getattr(self, key)!r} {', or '.join(why)}" for key, why in wrong.items())
            raise InputError(f"{self.title}: {told}") from None

    def multiply_adds(self, work: Work) -> int | None:
        """What the part costs on one sample, for the ledger: its matrix products and pairwise distances.

        Sums, sorts, gathers and norms do not count, as they do not in a model's own layers: a part of nothing else says
        ``multiply_adds = no_products``. None, the default: not stated, and shown as such, never as 0.
        """
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.settings().items())


@cache
def settings_model(part: type[Part]) -> type[BaseModel]:
    """A strict pydantic model of the constructor's arguments: types, limits and defaults, unknown keys refused."""
    hints = get_type_hints(part.__init__, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(part).parameters.items()
    }
    config = ConfigDict(
        strict=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
    return create_model(part.__name__, __config__=config, **fields)
