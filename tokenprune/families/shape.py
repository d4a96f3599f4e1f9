"""`model_shape`: the numbers of a model's configuration that the ledger needs."""

from __future__ import annotations

from typing import Any

from tokenprune.cost.shape import ModelShape
from tokenprune.families.catalogue import adapter_of


def model_shape(model_or_config: Any, *, name: str | None = None) -> ModelShape:
    """The shape of a transformers model, or of its configuration: no weights are needed.

    Args:
        model_or_config: of one of the supported families.
        name: how tables call it; its own path or family when left out.

    Raises:
        UnsupportedModelError: another family, or a vision tower that nobody has counted.
    """
    config = getattr(model_or_config, "config", model_or_config)
    return adapter_of(config, asker="ledger").shape(config, name)
