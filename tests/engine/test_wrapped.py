"""Models that others have wrapped, quantised or spread: adapters of PEFT, torchao, bitsandbytes, accelerate.

Each package is tried where it is installed (``pip install -e '.[wrapped]'``), and skipped where not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import build, inputs, row_inputs
from family_models import MODELS
from family_models.llava import Llava

import tokenprune as tp
from tokenprune.testing import checks
from tokenprune.testing.checks import Subject
from tokenprune.testing.kinds import kinds

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
KINDS = kinds(4)


def lora(model: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    names = r".*language_model.*(q_proj|k_proj|v_proj)"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()


def int8_weights(model: Any, folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def cpu_offload(model: Any, folder: Path) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offload(model: Any, folder: Path) -> Any:
    pytest.importorskip("accelerate").disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))
    return model


def device_map(model: Any, folder: Path) -> Any:
    """Every second layer on disk, as transformers spreads a model that does not fit."""
    pytest.importorskip("accelerate")
    text = next(name for name, module in model.named_modules() if module is model.get_decoder())
    places = {name: "cpu" for name, child in model.named_children()} | {
        f"model.{name}": "cpu" for name, child in model.model.named_children()
    }
    del places["model"], places[text]
    places |= {f"{text}.{name}": "cpu" for name, _ in model.get_decoder().named_children() if name != "layers"}
    places |= {f"{text}.layers.{index}": ("cpu", "disk")[index % 2] for index in range(4)}
    return loaded(model, folder, device_map=places, offload_folder=folder / "weights")


def loaded(model: Any, folder: Path, **more: Any) -> Any:
    """The same weights, as `from_pretrained` brings them."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **more)


Wrap = Callable[[Any, Path], Any]
SPREAD: tuple[Wrap, ...] = (cpu_offload, disk_offload, device_map)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", [lora, int8_weights, *SPREAD])
def test_wrapped_models_equal_their_own_masked_reference(wrap: Wrap, family: str, tmp_path: Path) -> None:
    model = wrap(build(family, layers=4), tmp_path)
    subject = Subject(model, inputs(family, model))
    for name in ("attention", "adaptive", "merging"):
        checks.equals_reference(subject, KINDS[name])
    checks.rater_attention(subject)
    checks.everything_kept(subject)
    checks.no_trace(subject)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", SPREAD)
def test_where_weights_lie_changes_nothing(wrap: Wrap, family: str, tmp_path: Path) -> None:
    """Layers whose weights come when they run: what a stage asks of a layer before it runs is there all the same."""
    model = build(family, layers=4)
    batch = inputs(family, model)
    with torch.no_grad(), tp.attach(model, KINDS["attention"]) as attached:
        expected, kept = model(**batch).logits, [stage.kept for stage in attached.report.stages]
    spread = wrap(model, tmp_path)
    if wrap is not device_map:
        assert {weight.device.type for weight in spread.get_decoder().layers.parameters()} == {"meta"}
    else:
        assert {weight.device.type for weight in spread.get_decoder().layers.parameters()} == {"meta", "cpu"}
    with torch.no_grad(), tp.attach(spread, KINDS["attention"]) as attached:
        logits = spread(**batch).logits
    assert all(map(torch.equal, kept, [stage.kept for stage in attached.report.stages]))
    assert torch.allclose(logits, expected, atol=1e-6)


class Wide(Llava):
    """bitsandbytes packs 64 numbers together: all widths are multiples."""

    def config(self) -> tuple[Any, Any]:
        model, config = super().config()
        config.text_config.intermediate_size = 128
        return model, config


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """Of its int8 without outliers: with them, a token's result depends on which others go through a layer with it."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    how: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0} if bits == 8 else {"load_in_4bit": True}
    with patch.dict(MODELS, {"llava": Wide()}):
        model = build("llava", layers=4)
    model = loaded(model, tmp_path, quantization_config=BitsAndBytesConfig(**how, llm_int8_skip_modules=kept))
    batch = row_inputs(inputs("llava", model), 0)
    for name in ("attention", "adaptive", "merging"):
        checks.equals_reference(Subject(model, batch, tolerance=1e-5), KINDS[name])
    checks.everything_kept(Subject(model, batch))


@pytest.mark.slow
def test_a_model_compiled_by_the_user() -> None:
    """`torch.compile(model)`, attached and called as such, after it has run without a recipe. (Of the language model
    alone: test_attach.py.)"""
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    with torch.no_grad():
        with tp.attach(model, kinds(2)["deep"]) as attached:
            expected, counts = model(**batch).logits, attached.report.vision_tokens
        compiled = torch.compile(model, backend="eager")
        untouched = compiled(**batch).logits
        with tp.attach(compiled, kinds(2)["deep"]) as attached:
            assert torch.allclose(compiled(**batch).logits, expected, atol=1e-5)
        assert torch.equal(attached.report.vision_tokens, counts)
        assert torch.equal(compiled(**batch).logits, untouched)
