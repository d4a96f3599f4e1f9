"""What a server may be started with: told before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenprune_vllm.settings import CPU_WORKER, check_server, reducer_of

from tokenprune.errors import RecipeError


def config(given: Any) -> Any:
    return SimpleNamespace(tokenprune=given, get_text_config=lambda: SimpleNamespace(num_hidden_layers=8))


def server(
    *,
    mrope: bool,
    hook: bool,
    shared: Any = None,
    encoded: Any = None,
    embeds: bool = False,
    device: str = "cuda",
    worker: str = "auto",
    pictures: int = 1,
) -> Any:
    multimodal = SimpleNamespace(
        is_multimodal_pruning_enabled=lambda: hook,
        enable_mm_embeds=embeds,
        get_limit_per_prompt=lambda modality: {"image": pictures}[modality],
    )
    return SimpleNamespace(
        kv_transfer_config=shared,
        ec_transfer_config=encoded,
        model_config=SimpleNamespace(uses_mrope=mrope, multimodal_config=multimodal),
        device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(worker_cls=worker),
    )


def renumbering(positions: str) -> dict[str, Any]:
    stage = {"place": "after_vision", "scheduler": {"type": "fixed", "keep": 4}, "positions": positions}
    return {"recipe": {"version": 1, "name": "own", "stages": [stage]}}


def test_the_recipe_comes_from_the_command_line() -> None:
    assert reducer_of(config({"recipe": "uniform", "keep": 0.25})).kept((12, 12)) == 36
    with pytest.raises(RecipeError, match=r"unknown key 'kepe' \(did you mean 'keep'\?\)"):
        reducer_of(config({"recipe": "uniform", "kepe": 0.25}))
    assert reducer_of(config({"recipe": "uniform", "pictures": "apart"})).alone
    with pytest.raises(RecipeError, match="pictures"):
        reducer_of(config({"recipe": "uniform", "pictures": "appart"}))
    with pytest.raises(RecipeError, match=r'expected "tokenprune": .*, got None'):
        reducer_of(config(None))
    with pytest.raises(RecipeError, match="between layers of the language model"):
        reducer_of(config({"recipe": "fastv"}))


@pytest.mark.parametrize(
    ("positions", "started", "reason"),
    [
        ("original", server(mrope=True, hook=True, shared=object()), "a shared KV store"),
        ("original", server(mrope=True, hook=True, encoded=object()), "a shared store of encoded pictures"),
        ("original", server(mrope=False, hook=True), "--video-pruning-rate 1e-18"),
        ("original", server(mrope=True, hook=False), "--video-pruning-rate 1e-18"),
        ("original", server(mrope=True, hook=True, pictures=999), '"pictures": "apart"'),
        ("original", server(mrope=True, hook=True, embeds=True), "takes no embeddings of pictures from clients"),
        ("original", server(mrope=True, hook=True, device="cpu"), f"--worker-cls {CPU_WORKER}"),
        ("renumber", server(mrope=True, hook=True), "takes no mrope_section"),
    ],
)
def test_a_server_that_would_be_wrong_in_silence_is_refused(positions: str, started: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        check_server(started, reducer_of(config(renumbering(positions))), renumbers=True)


def test_servers_that_are_right_start() -> None:
    check_server(server(mrope=True, hook=True), reducer_of(config(renumbering("original"))), renumbers=False)
    on_cpu = server(mrope=True, hook=True, device="cpu", worker=CPU_WORKER)
    check_server(on_cpu, reducer_of(config(renumbering("original"))), renumbers=False)
    plain = server(mrope=False, hook=False, embeds=True, device="cpu")
    check_server(plain, reducer_of(config(renumbering("renumber"))), renumbers=True)
    several = server(mrope=True, hook=True, pictures=999)
    check_server(several, reducer_of(config({**renumbering("original"), "pictures": "apart"})), renumbers=False)
    check_server(several, reducer_of(config({"recipe": {"version": 1, "stages": []}})), renumbers=False)
    with pytest.raises(RecipeError, match="not supported for this architecture"):
        check_server(server(mrope=False, hook=False), reducer_of(config(renumbering("renumber"))), renumbers=False)
