"""The recipe of a server, from ``--hf-overrides``, and what a server may not be started with."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import RecipeError, did_you_mean
from tokenprune.recipe import load_recipe
from tokenprune.serving import PictureReducer

BUDGETS = ("keep", "average", "final")
KEYS = ("recipe", "pictures", *BUDGETS)
CPU_WORKER = "tokenprune_vllm.cpu.Worker"


def reducer_of(config: Any) -> PictureReducer:
    """What ``--hf-overrides '{"tokenprune": {"recipe": "divprune", "keep": 0.25}}'`` names.

    The overrides ride in the model's configuration, so the processor, which sizes placeholders, and the model see one.

    Raises:
        RecipeError: nothing is named there, or a recipe that an engine cannot run.
    """
    given = getattr(config, "tokenprune", None)
    if not isinstance(given, dict) or "recipe" not in given:
        raise RecipeError(f'hf_overrides: expected "tokenprune": {{"recipe": "divprune", "keep": 0.25}}, got {given!r}')
    if unknown := [key for key in given if key not in KEYS]:
        hint = did_you_mean(unknown[0], KEYS)
        raise RecipeError(f"hf_overrides: tokenprune: unknown key {unknown[0]!r}{hint}; expected {', '.join(KEYS)}")
    sets = [f"pictures={given['pictures']}"] if "pictures" in given else []
    budget = {key: given[key] for key in BUDGETS if key in given}
    recipe = load_recipe(given["recipe"], sets=sets, **budget)
    return PictureReducer(recipe, depth=config.get_text_config().num_hidden_layers)


def check_server(vllm_config: Any, reducer: PictureReducer, *, renumbers: bool) -> None:
    """Refuse what would be wrong in silence.

    Args:
        vllm_config: of the server.
        reducer: its recipe.
        renumbers: whether the architecture can number survivors through.

    Raises:
        RecipeError: a store of KV blocks or of encoded pictures that servers share, whose keys do not hold the recipe;
            prompts of several pictures, where the recipe takes them together; positions that the runner will not give;
            or embeddings of pictures from clients, which bring none.
    """
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        raise RecipeError(
            "tokenprune: the keys of a shared KV store hold token ids and picture hashes, not the recipe: servers of "
            "two recipes would exchange wrong blocks; start without kv_transfer_config"
        )
    if getattr(vllm_config, "ec_transfer_config", None) is not None:
        raise RecipeError(
            "tokenprune: the keys of a shared store of encoded pictures hold picture hashes, not the recipe: servers "
            "of two recipes would exchange wrong pictures; start without ec_transfer_config"
        )
    settings = vllm_config.model_config.multimodal_config
    if not reducer.alone and settings.get_limit_per_prompt("image") != 1:
        raise RecipeError(
            "tokenprune: each picture of a prompt is reduced by itself here, and this recipe takes them together: add "
            '"pictures": "apart" to "tokenprune" among the overrides, which tokenprune.attach follows too, or start '
            "with --limit-mm-per-prompt '{\"image\": 1}'"
        )
    original = reducer.positions == "original"
    if not original and not renumbers:
        raise RecipeError("tokenprune: positions: renumber is not supported for this architecture; use original")
    model = vllm_config.model_config
    several, asked = model.uses_mrope, settings.is_multimodal_pruning_enabled()
    if original and not (several and asked):
        raise RecipeError(
            "tokenprune: positions: original needs the runner's hook for positions: --video-pruning-rate 1e-18 (which "
            "prunes no video), and for a model of one axis text_config.rope_parameters.mrope_section = [head size / 2, "
            "0, 0] among the overrides (README.md); or use a recipe with positions: renumber"
        )
    if original and settings.enable_mm_embeds:
        raise RecipeError(
            "tokenprune: positions: original takes no embeddings of pictures from clients, as these bring no "
            "positions: start without --enable-mm-embeds, or use a recipe with positions: renumber"
        )
    cpu = vllm_config.device_config.device_type == "cpu"
    if original and cpu and vllm_config.parallel_config.worker_cls != CPU_WORKER:
        raise RecipeError(
            "tokenprune: positions: original: vLLM's runner for CPUs does not call the hook for positions: add "
            f"--worker-cls {CPU_WORKER}, or use a recipe with positions: renumber"
        )
    if not original and several:
        raise RecipeError("tokenprune: positions: renumber takes no mrope_section among the overrides")
