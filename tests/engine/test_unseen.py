"""Nothing runs unpruned in silence: wrappers are looked through, merged embeddings are said or warned of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Row, build, inputs, row_inputs, text_only_inputs
from kinds import KINDS, fixed, recipe, stage
from pruned import logits_of
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.engine.packed.generate import generate_packed
from tokenprune.engine.packed.prompt import pack
from tokenprune.errors import InputError, NotFiredError, UnprunedWarning, UnsupportedModelError

HALF = recipe("half", stage(2, fixed(0.5), scorer="random"))
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@torch.no_grad()
def merged(family: str, model: Any, batch: Any) -> dict[str, Tensor]:
    """A prompt as embeddings, pictures merged in, as the language model gets them."""
    got: dict[str, Tensor] = {}
    keep = lambda module, args, kwargs: got.update(kwargs)  # noqa: E731
    with model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True):
        model(**batch)
    names = ["inputs_embeds", "attention_mask"] + (["position_ids"] if family.startswith("qwen") else [])
    deepstack = {name: got[name] for name in got if name.startswith(("visual", "deepstack"))}  # Qwen3-VL alone
    return {**{name: got[name] for name in names}, "attention_mask": batch["attention_mask"], **deepstack}


class Delegating(nn.Module):
    """The shape of PEFT's models: what holds the model passes on its attributes, and calls past its own modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_are_looked_through(family: str) -> None:
    model = build(family, layers=4)
    batch = inputs(family, model)
    wrapped = Delegating(Delegating(model))
    with tp.attach(model, HALF) as attached:
        expected = logits_of(model, batch), model.generate(**batch, **GREEDY), attached.report.vision_tokens
    with tp.attach(wrapped, HALF) as attached:
        assert torch.equal(logits_of(wrapped, batch), expected[0])
        assert torch.equal(wrapped.generate(**batch, **GREEDY), expected[1])
        assert torch.equal(attached.report.vision_tokens, expected[2])
        assert attached.anatomy.model is model


def test_a_wrapper_around_the_language_model_alone_is_looked_through() -> None:
    model = build("qwen3_vl", layers=4)  # its text model has a method of ours on it
    batch = inputs("qwen3_vl", model)
    with tp.attach(model, HALF):
        expected = logits_of(model, batch)
    text = model.model.language_model
    model.model.language_model = Delegating(text)
    with tp.attach(model, HALF) as attached:
        assert (attached.anatomy.text, attached.anatomy.base) == (text, model.model)
        assert torch.equal(logits_of(model, batch), expected)


def test_wrappers_that_cannot_be_looked_through_are_refused_by_name() -> None:
    model = build("llava", layers=2)
    two = nn.ModuleDict({"one": model, "other": build("llava", layers=2)})
    with pytest.raises(UnsupportedModelError, match="ModuleDict holds 2 models, one and other; attach to each of them"):
        tp.attach(two, "none")

    class Plain:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    with pytest.raises(UnsupportedModelError, match=r"Plain is no torch\.nn\.Module, but passes on the attributes"):
        tp.attach(Plain(), "none")


def test_a_peft_model_is_pruned() -> None:
    peft = pytest.importorskip("peft")
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    with tp.attach(tuned.get_base_model(), KINDS_4["attention"]) as attached:
        expected = tuned.generate(**batch, **GREEDY), attached.report.stages[-1].kept
    with tp.attach(tuned, KINDS_4["attention"]) as attached:
        assert torch.equal(tuned.generate(**batch, **GREEDY), expected[0])
        assert torch.equal(attached.report.stages[-1].kept, expected[1])


KINDS_4 = {"attention": recipe("attention", stage(2, fixed(0.4), raters="last_text", scorer={"type": "attention"}))}


# ------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_embeddings_are_pruned_where_the_caller_says_so(family: str) -> None:
    model = build(family, layers=6)
    batch = inputs(family, model)
    prompt = merged(family, model, batch)
    where = batch["input_ids"] == IMAGE
    with tp.attach(model, KINDS["attention"]) as attached, warnings.catch_warnings():
        warnings.simplefilter("error", UnprunedWarning)
        expected, counts = logits_of(model, batch), attached.report.vision_tokens
        with attached.vision_at(where):
            text = model.model.language_model(**prompt).last_hidden_state
            assert torch.equal(model.lm_head(text), expected)
            assert torch.equal(attached.report.vision_tokens, counts)
            if family != "qwen3_vl":  # its deep features cannot be merged in beforehand
                assert torch.equal(logits_of(model, prompt), expected)


def test_beams_repeat_what_the_caller_says_and_decoding_goes_on() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    prompt = merged("llava", model, batch)
    beams = {**GREEDY, "num_beams": 3}
    with tp.attach(model, HALF) as attached:
        expected = [model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :] for how in (GREEDY, beams)]
        with attached.vision_at(batch["input_ids"] == IMAGE):
            assert torch.equal(model.generate(**prompt, **GREEDY), expected[0])
            assert torch.equal(model.generate(**prompt, **beams), expected[1])
            assert torch.equal(
                model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :], expected[0]
            )  # ids tell


def test_a_mask_of_another_shape_is_refused() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    prompt = merged("llava", model, batch)
    where = batch["input_ids"] == IMAGE
    with tp.attach(model, HALF) as attached:
        for wrong in (where[:, :-1], where.repeat(2, 1), where[0]):
            with (
                attached.vision_at(wrong),
                pytest.raises(InputError, match=r"vision_at: a mask of shape .*expected \(2"),
            ):
                model(**prompt)


@pytest.mark.parametrize("way", ["model", "generate", "language model", "forward of the language model"])
def test_what_nobody_can_see_is_warned_of_once_and_no_earlier_run_is_told(way: str) -> None:
    model = build("llava", layers=4)
    one = row_inputs(inputs("llava", model), 0)
    prompt = merged("llava", model, one)
    text = model.model.language_model
    calls = {
        "model": lambda: model(**prompt),
        "generate": lambda: model.generate(**prompt, **GREEDY),
        "language model": lambda: text(**prompt),
        "forward of the language model": lambda: text.forward(**prompt),
    }
    with tp.attach(model, HALF) as attached, torch.no_grad():
        model.generate(**one, **GREEDY)
        assert attached.report.total == (25,)
        with pytest.warns(UnprunedWarning, match="recipe 'half' did not run: .* nothing tells which"):
            calls[way]()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnprunedWarning)
            calls[way]()
        assert "so nothing was reduced" in str(attached.report)
        for read in ("stages", "total", "vision_tokens"):
            with pytest.raises(NotFiredError, match="nothing tells which"):
                getattr(attached.report, read)
        model.generate(**one, **GREEDY)
        assert attached.report.total == (25,)


def test_a_single_token_is_no_prompt_and_warns_of_nothing() -> None:
    model = build("llava", layers=4)
    token = model.get_input_embeddings()(torch.tensor([[7]]))
    with tp.attach(model, HALF) as attached, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UnprunedWarning)
        model(**row_inputs(inputs("llava", model), 0))
        model.model.language_model.forward(inputs_embeds=token)
        assert attached.report.total == (25,)


def test_prompts_of_text_warn_of_nothing_and_leave_the_report() -> None:
    model = build("llava", layers=4)
    one, text = row_inputs(inputs("llava", model), 0), text_only_inputs("llava", model)
    embedded = model.get_input_embeddings()(text["input_ids"])
    with tp.attach(model, HALF) as attached, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UnprunedWarning)
        model.generate(**one, **GREEDY)
        model.generate(**text, **GREEDY)
        model.model.language_model(input_ids=text["input_ids"])
        with attached.vision_at(torch.zeros_like(text["input_ids"], dtype=torch.bool)):
            model(inputs_embeds=embedded, attention_mask=text["attention_mask"])
        assert attached.report.total == (25,)


def test_ids_of_a_forward_that_failed_are_not_taken_for_the_next() -> None:
    model = build("llava", layers=4)
    one = row_inputs(inputs("llava", model), 0)
    prompt = merged("llava", model, one)
    with tp.attach(model, HALF), torch.no_grad():
        with pytest.raises(ValueError, match="features"):
            model(**{**one, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)})
        with pytest.warns(UnprunedWarning):
            hidden = model.model.language_model(**prompt).last_hidden_state
    assert hidden.shape[1] == prompt["inputs_embeds"].shape[1]


@pytest.mark.parametrize("kind", ["after_vision", "attention"])
def test_packed_questions_warn_of_nothing(kind: str) -> None:
    model = build("llava")
    batch = inputs("llava", model, rows=[Row()])
    place = int((batch["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    prefix = batch["input_ids"][:, :place]
    prompt = pack(model, {"pixel_values": batch["pixel_values"]}, prefix, [[5, 6, 7], [8, 9]], [0, 0])
    with tp.attach(model, KINDS[kind]) as attached, warnings.catch_warnings():
        warnings.simplefilter("error", UnprunedWarning)
        assert len(generate_packed(attached, prompt, max_new_tokens=3)) == 2
        assert attached.report.total == (25, 25)
