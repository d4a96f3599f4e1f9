"""lmms-eval plug-in of tokenprune: ``--model tokenprune``."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told; nothing else is imported before the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokenprune", chat_class_path="tokenprune_lmms_eval.model.Tokenprune")
