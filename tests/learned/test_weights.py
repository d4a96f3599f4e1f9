"""Weights: written with what they are of, read where a recipe names them, refused where they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tokenprune as tp
from tokenprune.errors import InputError, RecipeError
from tokenprune.fitting.fresh import fresh_stages, without_weights
from tokenprune.parts.learned import HEAD, Host
from tokenprune.parts.scorers.learned import TextConditionedScorer
from tokenprune.recipe import list_learned_recipes, load_recipe
from tokenprune.recipe.weights import digest

HOST = Host("llava", 8)


def written(folder: Path, host: Host = HOST, dim: int = 4) -> str:
    """Weights in a file of `folder`, as a recipe names them."""
    data = TextConditionedScorer(dim=dim).start(host, seed=3).to_bytes()
    (folder / "mine.safetensors").write_bytes(data)
    return f"mine.safetensors#{digest(data)}"


def recipe(folder: Path, weights: str, dim: int = 4) -> Path:
    text = (
        "version: 1\nbudget: {keep: 0.5}\nstages:\n  - place: after_vision\n"
        f"    scorer: {{type: text_conditioned, dim: {dim}, weights: '{weights}'}}\n"
    )
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def tokens(width: int = 8) -> tp.Tokens:
    draw = torch.Generator().manual_seed(0)
    return tp.Tokens.from_hidden(
        torch.randn(2, 9, width, generator=draw), text=torch.randn(2, 3, width, generator=draw)
    )


def test_a_recipe_reads_the_weights_that_lie_beside_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, written(tmp_path))
    expected = TextConditionedScorer(dim=4).start(HOST, seed=3)(tokens())
    pipeline = tp.build(path)
    (stage,) = pipeline
    assert torch.equal(stage.scorer(tokens()), expected)
    assert pipeline["after_vision"](tokens()).hidden.shape == (2, 4, 8)
    # also when it was loaded before, changed, and when the working folder is another one
    assert torch.equal(next(iter(tp.build(load_recipe(load_recipe(path), keep=3)))).scorer(tokens()), expected)


def test_other_weights_are_another_recipe(tmp_path: Path) -> None:
    one = load_recipe(recipe(tmp_path, written(tmp_path)))
    other = load_recipe(recipe(tmp_path, "mine.safetensors#0123456789ab"))
    assert one.fingerprint != other.fingerprint
    with pytest.raises(RecipeError, match=r"has the digest \w{12}, and the recipe means 0123456789ab"):
        other.build_stages()


def test_a_missing_file_suggests_a_near_one(tmp_path: Path) -> None:
    path = recipe(tmp_path, written(tmp_path).replace("mine", "mime"))
    with pytest.raises(RecipeError, match=r"no weights mime.safetensors in .*did you mean 'mine.safetensors'"):
        tp.build(path)


@pytest.mark.parametrize("name", ["mine.pt#0123456789ab", "../x.safetensors#0123456789ab", "mine.safetensors"])
def test_only_a_plain_safetensors_file_with_a_digest_can_be_named(tmp_path: Path, name: str) -> None:
    expected = r"weights: should be FILE.safetensors#DIGEST, twelve digits of its SHA-256, or null \(got '"
    with pytest.raises(RecipeError, match=expected):
        load_recipe(recipe(tmp_path, name))


def test_without_weights_it_refuses_and_says_what_makes_them() -> None:
    for name in list_learned_recipes():
        pipeline = tp.build(without_weights(load_recipe(name)), depth=8)
        with pytest.raises(RecipeError, match=r"has no weights: make them with `tokenprune fit"):
            pipeline.run(pipeline.stages[0].place, tokens())


def test_another_width_is_told_with_both_numbers() -> None:
    part = TextConditionedScorer(dim=4).start(HOST, seed=0)
    with pytest.raises(InputError, match=r"for hidden states of 8 numbers \(llava\), got 6"):
        part(tokens(6))


def test_files_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    part = TextConditionedScorer(dim=8)
    written(tmp_path)
    with pytest.raises(RecipeError, match="was made with dim=4, not 8"):
        part.read(tmp_path / "mine.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RecipeError, match="was not written by tokenprune fit"):
        part.read(tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08")
    with pytest.raises(RecipeError, match="is no readable safetensors file"):
        part.read(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "head",
    ["[]", '{"settings": []}', '{"width": "8"}', '{"width": 0}', '{"heads": null}', '{"family": 1}'],
)
def test_heads_that_say_no_sense_are_refused_in_one_line(head: str, tmp_path: Path) -> None:
    part = TextConditionedScorer(dim=4)
    told = json.loads(head)
    if isinstance(told, dict):
        told = {"part": part.title, "settings": part._hyper(), "family": "llava", "width": 8, "heads": 0, **told}
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={HEAD: json.dumps(told)})
    with pytest.raises(RecipeError, match="was not written by tokenprune fit") as error:
        part.read(tmp_path / "odd.safetensors")
    assert len(str(error.value).splitlines()) == 1


def test_a_model_of_another_family_or_width_is_refused_when_attached(tmp_path: Path) -> None:
    from families import build

    path = recipe(tmp_path, written(tmp_path, Host("qwen2_vl", 64)))
    with pytest.raises(
        InputError, match=re.escape("made for qwen2_vl, width 64, and this model is llava, width 64, 4 heads")
    ):
        tp.attach(build("llava", layers=2), path)
    with pytest.raises(RecipeError, match="has no weights"):
        tp.attach(build("llava", layers=2), without_weights(load_recipe("text-conditioned")))


@pytest.mark.parametrize("name", list_learned_recipes())
def test_fresh_parts_start_the_same_for_the_same_seed(name: str) -> None:
    host = Host("", 8, 2, 2)
    one, same, other = (fresh_stages(load_recipe(name), host, seed=seed) for seed in (0, 0, 1))
    states = [[value for stage in stages for value in stage.state_dict().values()] for stages in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
