"""`encode`: pictures as reduced embeddings with their positions, for an engine that takes ``image_embeds``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.grids import Grid
from tokenprune.core.pictures import as_pictures
from tokenprune.engine.attach import Attached, attach
from tokenprune.engine.traces import shadow
from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.families.chat import Chat
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.serving import positions_of, refuse_question
from tokenprune.stage import Positions

if TYPE_CHECKING:
    from tokenprune.core.pictures import Picture, Shown


@dataclass(frozen=True, eq=False)
class Encoded:
    """One picture as the language model is to be given it: K embeddings of width D."""

    hidden: Tensor
    """``[K, D]`` what enters the language model."""
    kept: Tensor
    """``[K]`` int64: which of the picture's original tokens they are, ascending; of a merged token its anchor."""
    position: Tensor
    """``[K]``, or ``[3, K]`` where the model has positions on three axes (M-RoPE), int64: to be added to the position
    that the picture begins at, one behind that of the text token before it."""
    advance: int
    """By how much the text behind the picture is further on than where the picture begins."""
    grids: tuple[Grid, ...]
    """(T, H, W) of the untouched picture, and of its tiles where it has any."""
    positions: Positions
    """Whether `position` is the ``original`` one or survivors are numbered through (``renumber``)."""
    fingerprint: str
    """Of the recipe: belongs into the key of whatever is remembered of a picture."""


def encode(
    model: Any,
    processor: Any,
    pictures: Shown | Sequence[Shown],
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    keep: float | None = None,
    average: float | None = None,
    final: float | None = None,
) -> list[Encoded]:
    """Pictures through tower, projector and the recipe, each alone: what `attach` hands to the first layer.

        one, two = tp.encode(model, processor, [first, second], "divprune", keep=0.25)
        one.hidden                            # [K, D]

    Stages may act in the tower or after it, may read it, and may be adaptive, as engines follow the length they are
    given. The language model does not run.

    Args:
        model: as `attach` takes it.
        processor: its own.
        pictures: one or several, as files, Pillow images or arrays ``[H, W, 3]``.
        recipe: a recipe's name, path, dict or `Recipe`.
        keep: budget that replaces the recipe's: tokens of a picture, a share (float) or a count (int).
        average: the same, averaged over all layers.
        final: the same, after the last stage.

    Raises:
        RecipeError: the recipe is not valid, or its survivors depend on more than the picture.
        UnsupportedModelError: `attach` refuses the model, or it takes more of a picture than one row a token
            (DeepStack).
        InputError: a file that is no picture, or the processor refuses a picture.
    """
    loaded = load_recipe(recipe, keep=keep, average=average, final=final)
    asker, shown = "encode", as_pictures(pictures)
    # Checked before anything is mounted; the stages that run are built by `attach`.
    checked = Pipeline(
        loaded.build_stages(), budget=loaded.budget, depth=model.config.get_text_config().num_hidden_layers
    )
    refuse_question(checked, asker=asker)
    positions = positions_of(checked, asker=asker)
    with attach(model, loaded) as attached, torch.no_grad():
        title, deepstack = attached.anatomy.adapter.title, attached.anatomy.adapter.deepstack
        if deepstack is not None:
            raise UnsupportedModelError(
                f"{asker}: {title} adds features of a picture behind several layers (DeepStack), which embeddings do "
                "not carry; use attach"
            )
        chat = Chat(asker, attached.anatomy.model, processor)
        return [_encoded(attached, chat, picture, positions) for picture in shown]


class _ReachedError(Exception):
    """The first layer is reached: nobody needs what is behind it."""


def _encoded(attached: Attached, chat: Chat, picture: Picture, positions: Positions) -> Encoded:
    """One picture, in a prompt that asks nothing; the prompt's forward ends where its first layer would run."""
    engine, anatomy = attached.engine, attached.anatomy
    found: list[Encoded] = []
    inputs = chat.inputs([picture], "")

    def first_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefill, forward = engine.prefill, engine.now.forward
        if prefill is None or forward is None:
            raise InputError("encode: the processor made no vision tokens of the picture")
        tokens, prompt = prefill.prompt.tokens, prefill.prompt
        vision = anatomy.vision_mask(inputs["input_ids"], inputs["input_ids"][..., None])[0].to(hidden_states.device)
        ids = forward.positions[..., 0, :][..., vision]
        start, size = ids[..., 0], tokens.sizes[0]
        kept = tokens.origin[0, :size]
        if positions == "original":
            place, advance = ids[..., kept] - start[..., None], int(ids.max()) + 1 - int(start.max())
        else:
            place, advance = torch.arange(size, device=ids.device).expand(*ids.shape[:-1], -1), size
        found.append(
            Encoded(
                hidden=hidden_states[0, tokens.slot[0, :size]],
                kept=kept,
                position=place,
                advance=advance,
                grids=prompt.grids[0],
                positions=positions,
                fingerprint=attached.report.fingerprint,
            )
        )
        raise _ReachedError

    stop = shadow(anatomy.layers[0], "forward", first_layer)
    try:
        anatomy.model(**inputs, use_cache=False)
    except _ReachedError:
        pass
    finally:
        stop.remove()
    return found[0]
