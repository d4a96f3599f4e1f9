"""Models from folders and the hub: they load without torchvision, and what cannot load says why in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenprune.errors import InputError, TokenPruneError, UnsupportedModelError
from tokenprune.families.load import device_named, load


def test_qwen_processor_loads_without_torchvision(qwen_folder: Path, picture: Path) -> None:
    chat = load(str(qwen_folder), device="cpu")
    image = Image.open(picture)
    inputs = chat.inputs([image, image], "where is the cat ?")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 10], [1, 8, 10]]
    assert int((inputs["input_ids"] == chat.model.config.image_token_id).sum()) == 2 * 20
    assert chat.generate(inputs, 3).shape == (1, 3)
    assert chat.seen(image) is image


def test_llava_without_chat_template_asks_in_its_own_format(llava_folder: Path) -> None:
    chat = load(str(llava_folder), device="cpu", dtype="bfloat16")
    assert chat.prompt("where is the cat ?", 2) == "USER: <image>\n<image>\nwhere is the cat ? ASSISTANT:"
    inputs = chat.inputs([Image.new("RGB", (100, 60))], "where is the cat ?")
    assert str(inputs["pixel_values"].dtype) == "torch.bfloat16"
    assert int((inputs["input_ids"] == chat.model.config.image_token_id).sum()) == 16
    with pytest.raises(InputError, match=r"^the question contains '<image>', which this model takes for an image"):
        chat.inputs([Image.new("RGB", (100, 60))], "what is <image> ?")


def test_seen_is_the_square_that_the_processor_crops(llava_folder: Path) -> None:
    """A mark in each corner of the processor's own output tells whether ours is the same crop."""
    chat = load(str(llava_folder), device="cpu")
    image = Image.new("RGB", (200, 100))
    image.paste("white", (50, 0, 60, 10))
    seen = chat.seen(image)
    assert seen.size == (100, 100)
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    pixels = chat.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0, 0]
    assert pixels[0, 0] > 1  # the mark: 10 % of the crop, 5 or 6 of 56 pixels
    assert pixels[0, 8] < -1


def folder_with(path: Path, content: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "./none",
            InputError,
            "no such model folder: ./none; expected a folder, or a hub id (owner/name); "
            "tokenprune.scenes.load_embedded() gives the embedded model",
        ),
        (
            "embeded",
            InputError,
            "no such model folder: embeded; expected a folder, or a hub id (owner/name); "
            "tokenprune.scenes.load_embedded() gives the embedded model",
        ),
        ("TMP/file", InputError, "model TMP/file is a file; expected a folder with config.json, weights and processor"),
        ("TMP/empty", InputError, "no model in folder TMP/empty: it has no config.json"),
        (
            "TMP/broken",
            InputError,
            "TMP/broken/config.json is not readable JSON: Expecting value: line 1 column 1 (char 0)",
        ),
        ("TMP/untyped", InputError, "TMP/untyped/config.json names no model_type, so it is no transformers model"),
        (
            "TMP/strange",
            UnsupportedModelError,
            "this transformers version does not know the architecture of TMP/strange",
        ),
        (
            "some-owner/some-model",
            InputError,
            "no such model folder: some-owner/some-model; as a hub id it is not cached and the hub is out of reach",
        ),
    ],
)
def test_what_cannot_load_says_why(
    name: str, kind: type[TokenPruneError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    folder_with(tmp_path / "broken", "oops")
    folder_with(tmp_path / "untyped", {})
    folder_with(tmp_path / "strange", {"model_type": "strange"})
    with pytest.raises(kind) as caught:
        load(name.replace("TMP", str(tmp_path)), device="cpu")
    assert str(caught.value) == message.replace("TMP", str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", "is a llama model, which takes no images"),
        ("fuyu", "is a fuyu model, not supported yet; supported: llava, llava_next"),
    ],
)
def test_other_models_are_refused_before_weights_are_read(model_type: str, message: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", {"model_type": model_type})
    with pytest.raises(UnsupportedModelError) as caught:
        load(str(folder), device="cpu")
    assert str(caught.value).startswith(f"{folder} {message}")


def test_folder_without_weights(llava_folder: Path, tmp_path: Path) -> None:
    for file in llava_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=f"^cannot load {tmp_path}: .*no file named") as caught:
        load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_devices() -> None:
    assert device_named("cpu").type == "cpu"
    with pytest.raises(InputError, match=r"^device: expected cpu, cuda, cuda:0 or mps, got 'gpu'$"):
        device_named("gpu")
    with pytest.raises(InputError, match=r"^device 'cuda:99' is not available: PyTorch sees .* here$"):
        device_named("cuda:99")


def test_a_hub_out_of_reach_is_not_asked_again_and_again(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks six times, for half a minute; one question before it is enough."""
    asked: list[Any] = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *names, **more: asked.append(names))
    outcome = cli("run", "--model", "nobody/nothing")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "the hub is out of reach" in outcome.err
    assert not asked
