"""The OpenAI-compatible server of transformers with a recipe on every model that it loads.

    python serve.py MODEL RECIPE KEEP [PORT [HOST]]     # python serve.py embedded divprune 0.25 8000

`transformers serve` loads models by name, through its `ModelManager`, and gives no place for a recipe; so its handlers
are put together here over a manager that attaches one to whatever has been loaded. The recipe goes with its model when
that is unloaded. Needs transformers[serving].
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

import tokenprune as tp


class PrunedModels(ModelManager):
    """Models with a recipe on them."""

    def __init__(self, recipe: str, keep: float, **more: Any) -> None:
        self.recipe = tp.load_recipe(recipe, keep=keep)
        super().__init__(**more)  # preloads `force_model`

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs)
        tp.attach(model, self.recipe)  # before the first request can reach it
        return model


def app(recipe: str, keep: float, **more: Any) -> Any:
    """The server; `more` is for the `ModelManager`."""
    models, state = PrunedModels(recipe, keep, **more), GenerationState()
    given = {"model_manager": models, "generation_state": state}
    return build_server(
        models,
        ChatCompletionHandler(**given),
        completion_handler=CompletionHandler(**given),
        response_handler=ResponseHandler(**given),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(**given),
        generation_state=state,
    )


def folder_of(name: str) -> str:
    """A model as transformers is to be asked for it; ``embedded`` is the model in this package."""
    from tokenprune.scenes import embedded_path

    return str(embedded_path()) if name == "embedded" else name


if __name__ == "__main__":
    model, recipe, keep, *where = sys.argv[1:]
    port, host = (*where, *("8000", "localhost")[len(where) :])
    dtype = "auto" if torch.accelerator.is_available() else "float32"  # as tokenprune loads: halves are slow on a CPU
    uvicorn.run(app(recipe, float(keep), force_model=folder_of(model), dtype=dtype), host=host, port=int(port))
