"""Nothing is computed twice, nothing waits for the device, and long videos are scored in bounded memory."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Row, build, inputs, sizes
from kinds import ATTENTION, KINDS, fixed, recipe, stage
from memory import Memory
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenprune as tp
from tokenprune.core import transfer
from tokenprune.core.tokens import Tokens
from tokenprune.engine.projections import LayerInput, rater_attention, rotary
from tokenprune.engine.running import run_stage
from tokenprune.parts.raters.text import AboveMeanRaters

STATIC = ["after_vision", "attention", "merging", "deep"]


def calls(model: Any, batch: Any, asked: Any) -> dict[str, list[int]]:
    """How many rows each layer's q_proj and k_proj were given, call by call."""
    rows: dict[str, list[int]] = {}
    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        for name in ("q_proj", "k_proj"):
            at = rows.setdefault(f"{name} {index}", [])
            hook = lambda module, args, at=at: at.append(args[0].shape[1])  # noqa: E731
            handles.append(getattr(layer.self_attn, name).register_forward_pre_hook(hook))
    with tp.attach(model, asked), torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("raters", ["last_text", "above_mean", "all_text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_has_run_projects_nothing_again(family: str, raters: str) -> None:
    model = build(family)
    asked = recipe(
        "twice",
        stage(2, fixed(0.8), raters=raters, scorer=ATTENTION),
        stage(2, fixed(0.5), raters=raters, scorer={**ATTENTION, "rope": False}),
        stage(5, fixed(0.3), raters=raters, scorer={**ATTENTION, "normalise": "vision"}),
    )
    assert {len(rows) for rows in calls(model, inputs(family, model), asked).values()} == {1}


@pytest.mark.parametrize(("raters", "queries"), [("last_text", 1), ("all_text", 9)])
def test_of_the_next_layer_only_raters_are_projected(raters: str, queries: int) -> None:
    model = build("llava")
    batch = inputs("llava", model)
    length = batch["input_ids"].shape[1]
    asked = recipe("next", stage(3, fixed(0.5), raters=raters, scorer={**ATTENTION, "layer": "next"}))
    rows = calls(model, batch, asked)
    left = rows["q_proj 4"][0]
    assert left < length
    assert (rows["q_proj 3"], rows["k_proj 3"]) == ([queries, left], [length, left])


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_stand_in_the_cache_are_not_turned_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[int] = []

    def recording(attention: Any) -> Any:
        turn = rotary(attention)
        return lambda x, rope: (turned.append(x.shape[2]), turn(x, rope))[1]

    monkeypatch.setattr("tokenprune.engine.taps.rotary", recording)
    model = build(family)
    batch = inputs(family, model)
    asked = recipe(
        "rope",
        stage(1, fixed(0.7), raters="above_mean", scorer=ATTENTION),
        stage(3, fixed(0.4), raters="above_mean", scorer=ATTENTION),
    )
    scores = []
    for cached in (True, False):
        with tp.attach(model, asked) as attached, torch.no_grad():
            model(**batch, use_cache=cached)
        scores.append([each.scores for each in attached.report.stages])
        raters, length = 9, batch["input_ids"].shape[1]
        shorter = length - attached.report.total[0] + attached.report.stages[0].sizes[0]
        assert turned == ([raters, raters] if cached else [raters, length, raters, shorter])
        turned.clear()
    assert all(torch.equal(*each) for each in zip(*scores, strict=True))


def test_stages_with_the_same_raters_ask_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    forward = AboveMeanRaters.forward

    def recording(self: AboveMeanRaters, tokens: Tokens) -> Tensor:
        asked.append(self.threshold)
        return forward(self, tokens)

    monkeypatch.setattr(AboveMeanRaters, "forward", recording)
    model = build("llava")
    strict = {"type": "above_mean", "threshold": "above"}
    chain = recipe(
        "chain",
        stage(1, fixed(1.0), raters="above_mean", scorer=ATTENTION),
        stage(2, fixed(0.8), raters="above_mean", scorer=ATTENTION),
        stage(3, fixed(0.7), raters=strict, scorer=ATTENTION),
        stage(5, fixed(0.5), raters="above_mean", scorer=ATTENTION),
    )
    reports = []
    for shared, expected in ((True, 2), (False, 3)):
        monkeypatch.setattr(AboveMeanRaters, "per_prompt", shared)
        with tp.attach(model, chain) as attached, torch.no_grad():
            for _ in range(2):  # another prompt, other raters
                model(**inputs("llava", model))
        assert asked == ["at_least", "above", "at_least"][:expected] * 2
        reports.append(attached.report.stages)
        asked.clear()
    for once, again in zip(*reports, strict=True):
        assert torch.equal(once.kept, again.kept)
        assert once.scores is again.scores is None or torch.equal(once.scores, again.scores)


WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, torch.nonzero, torch.masked_select),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
}
"""What makes the host wait for an accelerator (on a CPU nothing does, but the calls are the same)."""


class Waits(TorchFunctionMode):
    """Counts them: those inside the decoder layers, and those of tokenprune anywhere."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.inside = False
        self.counts: Counter[str] = Counter()
        self.handles = [
            layers[0].register_forward_pre_hook(lambda *_: self.enter(True), prepend=True),
            layers[-1].register_forward_hook(lambda *_: self.enter(False)),
        ]

    def enter(self, inside: bool) -> None:
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func is Tensor.__getitem__ else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(index))
        if func in WAITS or by_mask:
            caller = sys._getframe(1)
            while "/torch/" in caller.f_code.co_filename and caller.f_back is not None:
                caller = caller.f_back
            self.counts["decoder"] += self.inside
            self.counts["tokenprune"] += caller.f_globals["__name__"].startswith("tokenprune")
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)


def waits(model: Any, run: Any) -> dict[str, int]:
    with torch.no_grad(), Waits(model.get_decoder().layers) as counted:
        run()
    return dict(counted.counts)


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_recipe_reads_the_device_once_before_the_decoder_and_never_inside(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    with tp.attach(model, KINDS[kind]):
        counted = waits(model, lambda: model(**batch))
    assert counted == {"decoder": 0, "tokenprune": 1}


def test_layers_that_need_not_know_the_prompt_run_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator is busy with them while the host locates the prompt's tokens."""
    events: list[Any] = []
    download = transfer.download

    def recording(x: Tensor) -> Any:
        copied = download(x)
        events.append("copy")
        return lambda: (events.append("look"), copied())[1]

    monkeypatch.setattr(transfer, "download", recording)
    model = build("llava")
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, index=index: events.append(index))
    asked = recipe("deep", stage(4, fixed(0.5), raters="last_text", scorer=ATTENTION))
    with tp.attach(model, asked), torch.no_grad():
        model(**inputs("llava", model))
    assert events[:5] == ["copy", 0, 1, 2, "look"], "the stage before layer 4 reads the keys of layer 3"


def test_an_adaptive_stage_reads_its_counts() -> None:
    model = build("llava")
    batch = inputs("llava", model)
    with tp.attach(model, KINDS["adaptive"]):
        counted = waits(model, lambda: model(**batch))
    assert counted == {"decoder": 2, "tokenprune": 3}


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_decode_steps_read_nothing(implementation: str) -> None:
    model = build("llava")
    batch = inputs("llava", model)

    def answer(new: int) -> dict[str, int]:
        options = {} if implementation == "dynamic" else {"cache_implementation": "static"}
        return waits(model, lambda: model.generate(**batch, max_new_tokens=new, do_sample=False, **options))

    with tp.attach(model, KINDS["attention"]):
        assert answer(2)["tokenprune"] == answer(6)["tokenprune"] == 1


class Operations(TorchDispatchMode):
    """Counts the operations of stages: on an accelerator, each is a kernel that the host launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        self.inside = False
        run = run_stage

        def watched(*args: Any) -> Any:
            self.inside = True
            try:
                return run(*args)
            finally:
                self.inside = False

        monkeypatch.setattr("tokenprune.engine.engine.run_stage", watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.inside and not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "most"), [("fastv", 66), ("feather", 64), ("sparsevlm-plus", 88), ("sparsevlm-v1.5", 142)]
)
def test_a_stage_takes_few_operations(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder layer takes some forty. Samples of one size need no masks against padding."""
    model = build("llava")
    batch = inputs("llava", model, rows=[Row(before=3, images=(max(sizes("llava")),), after=9)])
    with tp.attach(model, name, keep=0.3) as attached, torch.no_grad(), Operations(monkeypatch) as counted:
        model(**batch)
    ran = sum(stage.scores is not None for stage in attached.report.stages)
    assert ran >= 1
    assert 0 < counted.count <= most * ran


class Decoding(TorchDispatchMode):
    """The operations of `model` in steps of one token, in order; views are none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False
        model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)

    def enter(self, model: Any, args: Any, kwargs: Any) -> None:
        self.inside = kwargs["input_ids"].shape[1] == 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("name", ["fastv", "feather", "sparsevlm-v1.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_runs_what_the_untouched_models_runs(family: str, name: str) -> None:
    """The same operations, on a shorter cache: an accelerator has nothing more to do."""
    model = build(family)
    batch = inputs(family, model, rows=[Row(after=9)])

    def answer() -> list[str]:
        with Decoding(model) as ran:
            model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return ran.names

    untouched = answer()
    with tp.attach(model, name, keep=0.3) as attached:
        pruned = answer()
    assert attached.report.stages
    assert len(untouched) > 3 * 200
    assert pruned == untouched


def peak(layer: Any, normalise: Any, texts: int, *, n: int, block: int) -> int:
    """Bytes that scoring `n` vision tokens by `texts` raters takes at once."""
    decoder: Any = build("llava").get_decoder()
    attention: Any = decoder.layers[0].self_attn
    hidden = torch.randn(1, n + texts, 64)
    tokens = Tokens.from_hidden(hidden[:, :n], text=hidden[:, n:])
    source = LayerInput(
        layer=decoder.layers[0],
        turn=rotary(attention),
        hidden=hidden if layer == "next" else None,
        rope=decoder.rotary_emb(hidden, torch.arange(n + texts)[None]),
        mask=None,
        store=None,
        stored=0,
        text=torch.arange(n, n + texts)[None],
        tokens=tokens,
    )
    with torch.no_grad():
        if layer == "previous":
            source.queries, source.keys = attention.q_proj(hidden[:, n:]), attention.k_proj(hidden)
        scored = rater_attention({"previous": source, "next": source}, tokens, most=None)
        with Memory() as memory:
            scores = replace(scored, block_bytes=block).scores(
                torch.full((1, texts), 1 / texts), layer=layer, normalise=normalise
            )
    assert scores.shape == (1, 4, n)
    return memory.peak


@pytest.mark.parametrize("normalise", ["all", "vision"])
@pytest.mark.parametrize("layer", ["previous", "next"])
def test_raters_of_a_long_video_take_bounded_memory(layer: Any, normalise: Any) -> None:
    """50000 vision tokens: sixteen times the raters need their causal mask more, but never a larger block."""
    n, block = 50_000, 2**22
    few, many = (peak(layer, normalise, texts, n=n, block=block) for texts in (8, 128))
    keys = 4 * n * 64
    assert few < 6 * block + 4 * keys
    assert many - few < block + 2 * 128 * n
    assert block + 2 * 128 * n < 4 * 4 * 128 * n / 2, "the bound must be far below the whole matrix"


def test_the_memory_test_can_fail() -> None:
    with Memory() as memory:
        kept = torch.zeros(1000, 1000)
        (kept + 1).sum()
    assert memory.peak >= 8_000_000
    assert nn.Identity()(kept) is kept
