"""Whether learned parts of a recipe were made for the model that it is attached to."""

from __future__ import annotations

from typing import Any

from tokenprune.families.anatomy import Anatomy
from tokenprune.parts.learned import Host, Learned
from tokenprune.pipeline import Pipeline


def check_weights(pipeline: Pipeline, parts: Anatomy) -> None:
    """Raise unless every learned part has weights, and they are for this model.

    Raises:
        RecipeError: no weights.
        InputError: weights of another family or width.
    """
    learned = [part for stage in pipeline for part in stage.parts if isinstance(part, Learned)]
    if learned:
        host = host_of(parts)
        for part in learned:
            part.check_host(host)


def host_of(parts: Anatomy) -> Host:
    """The model, as weights name it."""
    config: Any = parts.model.config
    text = config.get_text_config()
    return Host(config.model_type, text.hidden_size, getattr(text, "num_attention_heads", 0), len(parts.layers))
