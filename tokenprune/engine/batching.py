"""Continuous batching (`generate_batch` and its manager) under an attached recipe: prompts of text alone.

transformers runs it in a thread of its own and swallows what is raised there, so that a caller would get an empty
answer. Prompts with vision tokens are refused where they are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from tokenprune.engine.traces import Handle, shadow
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import Anatomy


def refuse_pictures(anatomy: Anatomy, recipe: str) -> list[Handle]:
    """Let `generate_batch`, and `add_request` of managers that the model makes from now on, raise for pictures.

    Args:
        anatomy: of the model.
        recipe: name of the attached recipe, for the message.

    Returns:
        What takes that off again, managers included.
    """
    model: Any = anatomy.model
    if not hasattr(model, "init_continuous_batching"):
        return []
    batch, init = model.generate_batch, model.init_continuous_batching
    check = partial(_check, anatomy, recipe)
    managed = _Managed(check)

    def generate_batch(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for prompt in inputs:
            check(prompt)
        return batch(inputs, *args, **kwargs)

    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        return managed.add(init(*args, **kwargs))

    shadows = {"generate_batch": generate_batch, "init_continuous_batching": init_continuous_batching}
    return [managed, *(shadow(model, name, value) for name, value in shadows.items())]


class _Managed:
    """Managers whose `add_request` checks prompts, until `remove`."""

    def __init__(self, check: Any) -> None:
        self.check = check
        self.managers: list[Any] = []

    def add(self, manager: Any) -> Any:
        """Let `manager` check."""
        if "add_request" not in manager.__dict__:
            original = manager.add_request

            def add_request(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
                self.check(input_ids)
                return original(input_ids, *args, **kwargs)

            manager.add_request = add_request
            self.managers.append(manager)
        return manager

    def remove(self) -> None:
        for manager in self.managers:
            manager.__dict__.pop("add_request", None)
        self.managers = []


def _check(anatomy: Anatomy, recipe: str, prompt: Iterable[int]) -> None:
    ids = torch.as_tensor(prompt, dtype=torch.int64).flatten()[None]
    if bool(anatomy.vision_mask(ids, ids).any()):
        raise UnsupportedModelError(
            f"continuous batching (generate_batch): a prompt has vision tokens, and the attached recipe {recipe!r} "
            "cannot shorten the sequence of a paged cache; ask by generate(), or detach first"
        )
