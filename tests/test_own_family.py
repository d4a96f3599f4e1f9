"""Families of others: an adapter handed to `attach` or declared by a package; the contract on one's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from families import Row, build, inputs, row_inputs
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokenprune as tp
from tokenprune.cli.main import main
from tokenprune.errors import InputError, PluginWarning, UnsupportedModelError
from tokenprune.families import catalogue, plugins
from tokenprune.families.gemma import Gemma4
from tokenprune.families.llava import Llava
from tokenprune.families.load import load
from tokenprune.families.qwen import Qwen3
from tokenprune.families.shape import model_shape
from tokenprune.scenes import load_embedded
from tokenprune.testing import check_family
from tokenprune.testing.checks import Subject, in_rows


class Own(Llava):
    """LLaVA under another name."""

    family = "own_vl"
    title = "Own-VL"


class Unfinished(tp.Adapter):
    family = "own_vl"
    title = "Own-VL"


class Nameless(Own):
    title = None  # type: ignore[assignment]


class Miscounting(Own):
    def grids(self, base: Any, row: tp.VisionRow) -> Any:
        return ((1, 3, 3),)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Pretend that a package declares something as the family ``own_vl``, or under another name."""
    entries: list[EntryPoint] = []
    loads: dict[str, Callable[[], Any]] = {}

    def forget() -> None:
        plugins._declared.cache_clear()
        plugins._loaded.cache_clear()

    def declare(what: Any, name: str = "own_vl") -> None:
        value = f"theirs.family{len(entries)}:Own"
        entries.append(EntryPoint(name=name, value=value, group=plugins.GROUP))
        loads[value] = what if callable(what) and not isinstance(what, type) else lambda: what
        forget()

    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == plugins.GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda entry: loads[entry.value]())
    forget()
    yield declare
    monkeypatch.undo()
    forget()


@pytest.fixture
def own() -> Any:
    model = build("llava", layers=4)
    model.config.model_type = "own_vl"
    return model


def counts(model: Any, **more: Any) -> list[list[int]]:
    with tp.attach(model, "fastv", keep=0.4, **more) as attached, torch.no_grad():
        model(**inputs("llava", model))
    return attached.report.vision_tokens.tolist()


# ------------------------------------------------------------------------------------------------- finding an adapter


def test_an_adapter_is_handed_to_attach(own: Any) -> None:
    expected = counts(build("llava", layers=4))
    assert counts(own, adapter=Own()) == expected
    wrapped = nn.ModuleDict({"inside": own})
    assert tp.attach(wrapped, "none", adapter=Own()).anatomy.model is own
    with pytest.raises(
        UnsupportedModelError, match=r"no adapter for LlavaFor\w+ \(model_type 'own_vl'\).*your-own-fam"
    ):
        counts(own)


def test_a_budget_of_multiply_adds_asks_the_adapter_at_hand(own: Any) -> None:
    with tp.attach(own, "fastv", flops=0.9, adapter=Own()) as attached, torch.no_grad():
        own(**inputs("llava", own))
    assert attached.report.vision_tokens[0, -1] < 25


def test_a_package_declares_a_family(
    own: Any, install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Own)
    monkeypatch.setattr("sys.argv", ["tokenprune", "ls", "models"])
    assert counts(own) == counts(build("llava", layers=4))
    assert model_shape(own).family == "own_vl"
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr().out
    assert not stopped.value.code and "Own-VL" in told and "Qwen3-VL" in told


def test_ours_come_first(install: Install) -> None:
    install(Miscounting, name="llava")
    assert type(catalogue.adapter_of(build("llava"), asker="attach")) is Llava


def test_a_family_is_imported_when_a_model_of_it_comes(own: Any, install: Install) -> None:
    loaded = []
    install(lambda: loaded.append(1) or Own)
    assert counts(build("llava")) and "own_vl" in catalogue.families() and not loaded
    assert counts(own) and loaded


def test_a_folder_of_a_declared_family_loads(install: Install, tmp_path: Path) -> None:
    """Its package tells transformers of the classes when it is imported, which is before they are needed."""

    class OwnConfig(LlavaConfig):
        model_type = "own_vl"

    class OwnForConditionalGeneration(LlavaForConditionalGeneration):
        config_class = OwnConfig

    def imported() -> type[Own]:
        AutoConfig.register("own_vl", OwnConfig)
        AutoModelForImageTextToText.register(OwnConfig, OwnForConditionalGeneration)
        return Own

    model, processor = load_embedded()
    OwnForConditionalGeneration(OwnConfig(**model.config.to_dict() | {"model_type": "own_vl"})).save_pretrained(
        tmp_path
    )
    processor.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not know the architecture"):
        load(str(tmp_path))
    install(imported)
    try:
        assert type(load(str(tmp_path)).model) is OwnForConditionalGeneration
    finally:
        CONFIG_MAPPING._extra_content.pop("own_vl", None)
        AutoModelForImageTextToText._model_mapping._extra_content.pop(OwnConfig, None)


# ------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Own, r"attach: adapter: expected an adapter, got the class; write Own\(\)"),
        ("own_vl", r"attach: adapter: expected an instance of a subclass of tokenprune\.Adapter, got str"),
        (Nameless(), r"attach: adapter: Nameless has no title, its name for people"),
        (Qwen3(), r"attach: adapter Qwen3 is for model_type 'qwen3_vl', got LlavaFor\w+ \(model_type 'own_vl'\)"),
    ],
)
def test_what_is_handed_to_attach_must_be_an_adapter_for_the_model(own: Any, adapter: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tp.attach(own, "fastv", adapter=adapter)


def fails() -> Any:
    raise ImportError("no module named pebbles")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (fails, r"entry point 'own_vl' = 'theirs\.family0:Own' cannot be loaded: ImportError: no module named pebbles"),
        (dict, r"expected a subclass of tokenprune\.Adapter, got <class 'dict'>"),
        (Unfinished, r"Unfinished is unfinished: write grids"),
        (Nameless, r"Nameless has no title, its name for people"),
        (Qwen3, r"its family is 'qwen3_vl'; an entry point has the name of the family"),
    ],
)
def test_what_a_package_declares_must_be_an_adapter(own: Any, install: Install, declared: Any, message: str) -> None:
    """It harms nobody who does not use that family."""
    install(declared)
    assert counts(build("llava"))
    with pytest.raises(UnsupportedModelError, match=message):
        counts(own)
    with pytest.warns(PluginWarning, match=message):
        assert "own_vl" not in catalogue.adapters()


def test_two_packages_with_one_family_are_told(own: Any, install: Install) -> None:
    install(Own)
    install(Own)
    with pytest.raises(
        UnsupportedModelError, match=r"two packages bring an adapter for own_vl: 'theirs\.family0:Own' and"
    ):
        counts(own)


class Bare(nn.Module):
    """A model, of which some members are missing."""

    def __init__(self, text: nn.Module | None = None, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="own_vl", **config)
        if text is not None:
            self.text = text
            self.get_decoder = lambda: text


def text_model(**more: Any) -> nn.Module:
    found = nn.Module()
    for name, value in more.items():
        setattr(found, name, value)
    return found


LAYERS = nn.ModuleList([nn.Linear(2, 2)])
TEXT = {"get_text_config": lambda: SimpleNamespace()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bare(**TEXT), r"Own-VL: Bare has no get_decoder\(\), which returns the language model"),
        (Bare(text_model()), r"Own-VL: Bare has no config\.get_text_config\(\), which"),
        (Bare(text_model(), **TEXT), r"the language model, Module, has no layers, the list of its decoder layers"),
        (Bare(text_model(layers=LAYERS), **TEXT), r"the language model, Module, has no rotary_emb, the module that"),
        (
            Bare(text_model(layers=LAYERS, rotary_emb=nn.Identity(), config=1), **TEXT),
            r"configuration of Bare has neither image_token_id nor video_token_id, the id that stands for",
        ),
    ],
)
def test_a_missing_member_is_told(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tp.attach(model, "none", adapter=Own())


def test_an_adapter_that_miscounts_is_told(own: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Miscounting\.grids told \[\(1, 3, 3\)\], which is 9 vision tokens, "
    ):
        counts(own, adapter=Miscounting())


def test_attention_without_a_rotary_embedding_beside_it_is_told(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb")
    with pytest.raises(
        UnsupportedModelError, match=r"modeling_llama has no apply_rotary_pos_emb, the rotary embedding of"
    ):
        tp.attach(own, "fastv", adapter=Own())


# ------------------------------------------------------------------------------------------------- the contract


def check(model: Any, name: str, **more: Any) -> Any:
    batch = inputs(name, model)
    return check_family(model, batch, rows=[row_inputs(batch, row) for row in range(2)], **more)


def test_a_sound_family_holds_everywhere(own: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(own, "llava", adapter=Own())
    assert found.ok and len(found.of("holds")) == len(found) == 16
    told = capsys.readouterr().out
    assert told == f"{found}\n"
    assert "LlavaForConditionalGeneration, Own-VL (own_vl): 4 layers, input_ids [2, 62]" in told
    assert "✓ recipe deep          25 → 1 vision tokens, logits within " in told
    assert own.get_decoder().config._attn_implementation == "sdpa", "the kernel was switched and not put back"


def test_refusals_are_no_faults() -> None:
    found = check(build("gemma3"), "gemma3")
    assert found.ok and found.of("refused") == ("static cache",)


def test_features_that_are_added_to_dropped_tokens_are_found() -> None:
    class Shallow(Qwen3):
        deepstack = None

    found = check(build("qwen3_vl"), "qwen3_vl", adapter=Shallow())
    assert not found.ok and {"recipe after_vision", "row alone"} <= set(found.of("wrong"))
    assert "keep 1.0" in found.of("holds")


def test_arguments_for_dropped_tokens_are_found() -> None:
    class Narrow(Gemma4):
        per_token: ClassVar[dict[str, int]] = {}

    found = check(build("gemma4"), "gemma4", adapter=Narrow())
    assert {"recipe deep", "no cache", "second turn"} <= set(found.of("wrong"))


def test_a_layer_that_changes_what_enters_its_norm_is_found(own: Any) -> None:
    bias = torch.randn(64)
    layer = own.get_decoder().layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + bias, *args[1:]), kwargs), with_kwargs=True
    )
    found = check(own, "llava", adapter=Own())
    assert found.of("wrong") == ("rater attention",)
    assert any("layer 0, read by 'next': scores differ by " in finding.words for finding in found)


def test_a_model_that_remembers_is_found(own: Any) -> None:
    """A row that depends on its neighbours, and a call that depends on the one before."""
    head = own.lm_head.register_forward_hook(lambda module, args, output: output + 0.01 * output[:1])
    assert "row alone" in check(own, "llava", adapter=Own()).of("wrong")
    head.remove()
    calls = [0.0]

    def drift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1e-3
        return output + calls[0]

    own.lm_head.register_forward_hook(drift)
    assert {"keep 1.0", "detach"} <= set(check(own, "llava", adapter=Own()).of("wrong"))


def test_what_is_left_on_a_model_is_found(own: Any) -> None:
    calls: list[int] = []
    own.model.register_forward_hook(lambda module, *_: setattr(module, f"call_{len(calls)}", calls.append(1)))
    found = check(own, "llava", adapter=Own())
    assert found.of("wrong") == ("detach",) and "attributes or hooks were left on model" in str(found)


def test_a_model_whose_answers_do_not_depend_on_the_picture_shows_nothing(own: Any) -> None:
    for layer in own.get_decoder().layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    found = check(own, "llava", adapter=Own())
    assert found.of("wrong") == ("vision tokens",)
    assert "equality would show nothing here" in found[0].words


def test_what_the_model_itself_cannot_do_is_not_tried(own: Any) -> None:
    own.generate = lambda **kwargs: 1 / 0
    found = check(own, "llava", adapter=Own())
    assert found.of("holds") == ("vision tokens", "rater attention") and len(found.of("not tried")) == 14
    assert found.ok and "the untouched model raises ZeroDivisionError: division by zero" in str(found)


def test_rows_are_told_from_a_batch_with_one_picture_a_row(own: Any) -> None:
    batch = inputs("llava", own, rows=[Row(after=9), Row(after=4)])
    rows = in_rows(Subject(own, batch)).rows
    assert rows is not None
    for row, expected in zip(rows, [row_inputs(batch, 0), row_inputs(batch, 1)], strict=True):
        assert row.keys() == expected.keys() and all(torch.equal(row[name], expected[name]) for name in row)
    several = Subject(own, inputs("llava", own))
    assert in_rows(several).rows is None and in_rows(replace(several, rows=[batch])).rows == [batch]
    found = check_family(own, several.batch, adapter=Own())
    assert found.of("not tried") == ("row alone", "prompt lookup") and "give rows=[...]" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.long)},
            r"row 0 of input_ids has 0 vision tokens; expected at least",
        ),
        ({"input_ids": None}, r"inputs have no input_ids \[B, L\]"),
    ],
)
def test_inputs_that_ask_nothing_are_refused(own: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_family(own, inputs("llava", own) | change, adapter=Own())


def test_half_precision_is_refused(own: Any) -> None:
    with pytest.raises(InputError, match=r"weights are torch\.bfloat16; expected torch\.float32"):
        check(own.bfloat16(), "llava", adapter=Own())


def test_arguments_of_the_base_model_may_come_without_names(own: Any) -> None:
    """The mask of padding above all: read as none, padding would count as words."""
    batch, base = inputs("llava", own, side="right"), own.model
    with tp.attach(own, "fastv", keep=0.4, adapter=Own()) as attached, torch.no_grad():
        named = base(**batch).last_hidden_state
        kept = [stage.kept for stage in attached.report.stages]
        bare = base(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).last_hidden_state
    assert torch.equal(named, bare)
    assert all(map(torch.equal, kept, [stage.kept for stage in attached.report.stages]))
