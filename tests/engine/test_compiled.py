"""Compiled and eager give the same, in whole graphs, whose number is known."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from families import CACHE, FAMILIES, Row, build, inputs, text_only_inputs
from kinds import ATTENTION, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, worst
from reference import generate_logits
from torch._dynamo.utils import counters
from transformers import AutoConfig, CompileConfig, StaticCache

import tokenprune as tp
from tokenprune.core.report import Graphs
from tokenprune.engine import compiled
from tokenprune.errors import InputError, UnsupportedModelError

TRACED = {"backend": "eager"}
"""Dynamo traces and guards as ever; what it traced is run as it is, which takes no time to compile."""
LAYERS = 3
TOWERS = ("llava", "llava_next")
"""Families whose vision tower is a graph, too."""
STATIC = recipe(
    "static",
    stage(1, fixed(0.7), raters="last_text", scorer=ATTENTION, recycler={"type": "cluster", "per_cluster": 3}),
    stage(
        2,
        fixed(0.4),
        raters="above_mean",
        scorer={**ATTENTION, "layer": "next", "rope": False, "normalise": "vision"},
        positions="renumber",
    ),
)
ADAPTIVE = recipe(
    "adaptive",
    stage(
        1,
        {"type": "lattice", "stride": 3, "keep": 0.3},
        raters="last_text",
        scorer={**ATTENTION, "rope": False, "normalise": "vision"},
        sampler={"type": "union", "stride": 3},
    ),
    stage(
        2,
        {"type": "rank_ratio", "scale": 0.5, "energy": 0.9},
        raters="above_mean",
        scorer=ATTENTION,
        recycler={"type": "cluster", "share": 0.5, "per_cluster": 3},
    ),
)
RENUMBERED = recipe("renumbered", STATIC["stages"][1] | {"place": {"before_layer": 1}})
UNIFORM = recipe("uniform", stage(1, fixed(0.5), sampler="uniform"))
families = pytest.mark.parametrize(
    "family", [family if family == "llava" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
"""Tracing is slow, so the others wait for ``-m slow``."""


@pytest.fixture(autouse=True)
def _no_compiled_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()


def eager(model: Any, batch: Any, asked: Any) -> Any:
    with tp.attach(model, asked) as attached:
        sequences, logits = generate_logits(model, batch)
    return sequences, logits, attached.report


def same_choice(first: Any, second: Any) -> bool:
    return all(
        torch.equal(a.kept, b.kept) and torch.equal(a.merged, b.merged) and a.sizes == b.sizes
        for a, b in zip(first.stages, second.stages, strict=True)
    )


@families
def test_static_recipe(family: str) -> None:
    """One graph for the prefill, one for all decode steps, one for a tower of fixed size; none for the same shapes
    again, on other pictures."""
    tower = family in TOWERS
    model = build(family, layers=LAYERS)
    batch, other = (inputs(family, model, seed=seed) for seed in (0, 1))
    expected, others = eager(model, batch, STATIC), eager(model, other, STATIC)
    with tp.attach(model, STATIC, compile=TRACED) as attached:
        sequences, logits = generate_logits(model, batch)
        assert attached.report.graphs == Graphs(compiled=2 + tower, calls=6 + tower)
        assert same_choice(attached.report, expected[2])
        again, again_logits = generate_logits(model, other)
        assert attached.report.graphs == Graphs(compiled=2 + tower, calls=2 * (6 + tower))
        assert same_choice(attached.report, others[2])
    assert torch.equal(sequences, expected[0]) and worst(logits, expected[1]) < TOLERANCE
    assert torch.equal(again, others[0]) and worst(again_logits, others[1]) < TOLERANCE


GROUPED = stage(
    1,
    fixed(0.6),
    scorer="norm",
    grouper={"type": "window", "height": 2, "width": 2},
    recycler={"type": "cluster", "share": 0.8, "per_cluster": 3},
    rectifier="log_mass",
)


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("qwen2_5_vl", "dynamic"),
        pytest.param("llava", "static", marks=pytest.mark.slow),
        pytest.param("llava", "dynamic", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", "static", marks=pytest.mark.slow),
    ],
)
def test_groups_and_biases_are_in_the_graph(family: str, cache: str) -> None:
    """A picture's windows are constants, and biases outlive the prefill in either cache."""
    model = build(family, layers=LAYERS)
    batch, asked = inputs(family, model), recipe("grouped", GROUPED)
    expected = eager(model, batch, asked)
    with tp.attach(model, asked, compile=TRACED) as attached:
        sequences, logits = generate_logits(model, batch, cache_implementation=cache)
        assert attached.report.graphs is not None and attached.report.graphs.breaks == 0
        assert same_choice(attached.report, expected[2])
    assert torch.equal(sequences, expected[0]) and worst(logits, expected[1]) < TOLERANCE


@pytest.mark.slow
def test_groups_of_what_an_earlier_stage_has_left_are_not_static() -> None:
    """Which tokens of a window are left is known on the device alone, so such a prefill is a graph a layer."""
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    asked = recipe("behind", stage(1, fixed(0.8), scorer="norm"), {**GROUPED, "place": {"before_layer": 2}})
    assert not tp.build(asked, depth=LAYERS).static
    expected = eager(model, batch, asked)
    with tp.attach(model, asked, compile=TRACED) as attached:
        sequences, logits = generate_logits(model, batch)
        assert same_choice(attached.report, expected[2])
    assert torch.equal(sequences, expected[0]) and worst(logits, expected[1]) < TOLERANCE


@families
def test_adaptive_recipe(family: str) -> None:
    """One graph a layer, one for all decode steps, one for the tower; the counts stay exact, whatever the buckets."""
    tower = family in TOWERS
    model = build(family, layers=LAYERS)
    batch = inputs(family, model)
    expected = eager(model, batch, ADAPTIVE)
    with tp.attach(model, ADAPTIVE, compile=TRACED) as attached:
        for calls in (1, 2):
            sequences, logits = generate_logits(model, batch)
            assert attached.report.graphs == Graphs(compiled=LAYERS + 1 + tower, calls=calls * (LAYERS + 5 + tower))
            assert same_choice(attached.report, expected[2])
            assert torch.equal(sequences, expected[0]) and worst(logits, expected[1]) < TOLERANCE


def test_buckets_bound_the_graphs_of_an_adaptive_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures whose counts differ share a graph when they fall into one bucket."""
    model = build("llava", layers=2)
    union = {"type": "lattice", "stride": 3, "keep": 0.5}, {"type": "union", "stride": 3}
    asked = recipe("union", stage(1, union[0], raters="all_text", scorer=ATTENTION, sampler=union[1]))
    batches = [inputs("llava", model, rows=[Row(after=9)], seed=seed) for seed in range(6)]
    counts = [eager(model, batch, asked)[2].stages[0].sizes[0] for batch in batches]
    lengths = {(25 - count) // 7 for count in counts}
    assert len(lengths) < len(set(counts)), "the pictures must differ within a bucket"
    monkeypatch.setattr(compiled, "BUCKETS", 4)
    monkeypatch.setattr("tokenprune.engine.attach.BUCKETS", 4)  # of 25 tokens, 7 each
    with tp.attach(model, asked, compile=TRACED) as attached:
        for batch, count in zip(batches, counts, strict=True):
            logits = logits_of(model, batch)
            assert attached.report.stages[0].sizes == (count,)
            assert logits.shape[1] == batch["input_ids"].shape[1] - (25 - count) // 7 * 7
        graphs = attached.report.graphs
    assert graphs == Graphs(compiled=2 + len(lengths), calls=3 * len(batches))


def test_a_new_shape_is_a_graph_and_no_recompile() -> None:
    model = build("llava", layers=2)
    with tp.attach(model, UNIFORM, compile=TRACED) as attached:
        for graphs, after in enumerate((4, 6, 4, 6), start=1):
            logits_of(model, inputs("llava", model, rows=[Row(after=after)]))
            assert attached.report.graphs == Graphs(compiled=1 + min(graphs, 2), calls=2 * graphs)


def each_is_a_graph(model: Any, batches: list[Any]) -> None:
    """Each of these prompts compiles one more graph, no recompile of a known one, and gives what it gives eagerly."""
    with tp.attach(model, RENUMBERED):
        expected = [logits_of(model, batch) for batch in batches]
    with tp.attach(model, RENUMBERED, compile=TRACED) as attached:
        for graphs, (batch, logits) in enumerate(zip(batches, expected, strict=True), start=1):
            assert worst(logits_of(model, batch), logits) < TOLERANCE
            assert attached.report.graphs == Graphs(compiled=1 + graphs, calls=2 * graphs)


@pytest.mark.slow
def test_padding_is_a_graph_and_no_recompile() -> None:
    """Without padding, positions are renumbered without looking for it. With masks of four dimensions nothing else
    tells the two prompts apart."""
    model = build("llava", layers=2)
    batches = [inputs("llava", model, rows=[Row(after=9), Row(after=after)]) for after in (9, 7)]
    for batch in batches:
        real = batch["attention_mask"].bool()
        batch["attention_mask"] = real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    each_is_a_graph(model, batches)


@pytest.mark.slow
def test_what_else_the_host_knows_of_a_prompt_is_a_graph_and_no_recompile() -> None:
    """Prompts of one length: other text behind the picture, padding among it, position ids with a gap."""
    model = build("llava", layers=2)
    first, second = Row(before=3, after=9), Row(before=5, after=7)
    batches = [inputs("llava", model, rows=rows) for rows in ([first, first], [second, second], [first, second])]
    ids = torch.arange(batches[0]["input_ids"].shape[1]).expand(2, -1)
    batches = [{**batch, "position_ids": ids} for batch in batches]
    batches.append({**batches[0], "position_ids": torch.where(ids > 4, ids + 3, ids)})
    assert len({batch["input_ids"].shape for batch in batches}) == 1
    each_is_a_graph(model, batches)


@pytest.mark.slow
def test_more_shapes_than_torch_compile_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava", layers=1)
    asked = recipe("early", stage("after_vision", fixed(0.5), sampler="uniform"))
    with tp.attach(model, asked, compile=TRACED) as attached:
        for after in range(1, 11):
            logits_of(model, inputs("llava", model, rows=[Row(after=after)]))
        assert attached.report.graphs == Graphs(compiled=11, calls=20)
        monkeypatch.setattr(compiled, "SHAPES", 10)
        with pytest.raises(UnsupportedModelError, match="more than 10 shapes of prompts"):
            logits_of(model, inputs("llava", model, rows=[Row(after=12)]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ({"do_sample": True}, {"cache_implementation": "dynamic"})
        ),
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    with tp.attach(model, UNIFORM):
        expected = generate_logits(model, batch, **options)
    with tp.attach(model, UNIFORM, compile=TRACED) as attached:
        got = generate_logits(model, batch, **options)
        assert attached.report.graphs.compiled == (2 if "cache_implementation" in options else 3)
        assert (attached.report.graphs.breaks, attached.report.graphs.recompiles) == (0, 0)
    assert torch.equal(got[0], expected[0]) and worst(got[1], expected[1]) < TOLERANCE


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_one_forward_and_its_gradient(options: dict[str, Any]) -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    results = []
    for compile in (False, {"backend": "aot_eager"}):
        with tp.attach(model, UNIFORM, compile=compile):
            logits = model(**batch, **options).logits
            results.append((logits, *torch.autograd.grad(logits.square().mean(), weight)))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.slow
def test_buffers_are_as_small_as_without_compile() -> None:
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    sizes = []
    for compile in (False, TRACED):
        with tp.attach(model, STATIC, compile=compile):
            cache = model.generate(
                **batch, max_new_tokens=3, do_sample=False, cache_implementation="static", return_dict_in_generate=True
            )[CACHE]
        sizes.append([layer.keys.shape[-2] for layer in cache.layers])
    assert sizes[0] == sizes[1]
    assert sizes[0][0] > sizes[0][1] > sizes[0][2]


@pytest.mark.slow
def test_the_default_backend() -> None:
    """Inductor, on as little as it takes, for it compiles for a minute or more."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = build("llava", layers=1)
    batch = inputs("llava", model)
    early = recipe("early", stage("after_vision", fixed(0.5), sampler="uniform"))
    with tp.attach(model, early):
        expected = logits_of(model, batch)
    with tp.attach(model, early, compile=True) as attached:
        got = logits_of(model, batch, use_cache=False)
    assert (got - expected).abs().max() < TOLERANCE
    assert attached.report.graphs == Graphs(compiled=2, calls=2)


def test_transformers_own_compiled_decoding_does_not_break() -> None:
    """On an accelerator `generate` compiles each step on a static cache by itself, our hooks included."""
    model = build("llava", layers=LAYERS)
    batch = inputs("llava", model)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    expected = eager(model, batch, STATIC)
    before = counters["stats"]["unique_graphs"]
    with tp.attach(model, STATIC):
        got = generate_logits(model, batch, cache_implementation="static", compile_config=config)
    assert torch.equal(got[0], expected[0]) and worst(got[1], expected[1]) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize(
    ("asked", "prefill"),
    [
        ({"mode": "reduce-overhead"}, {"mode": "default"}),
        ({"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"}),
        ({"options": {"triton.cudagraphs": True}}, {"options": {"triton.cudagraphs": False}}),
        ({"backend": "eager"}, {"backend": "eager"}),
    ],
)
def test_only_decode_steps_record_cuda_graphs(
    asked: dict[str, Any], prefill: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile, given = torch.compile, []

    @wraps(compile)
    def recording(function: Any, **options: Any) -> Any:
        given.append({name: value for name, value in options.items() if name not in ("fullgraph", "dynamic")})
        return compile(function, **TRACED)

    model = build("llava", layers=2)
    monkeypatch.setattr(torch, "compile", recording)
    with tp.attach(model, UNIFORM, compile=asked):
        first, *others = given[1:]  # the very first checks the options
        assert [first, *others] == [prefill, asked, prefill], "prefill, decode step, vision tower"


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(("given", "static"), [({}, True), ({"use_cache": True}, True), ({"use_cache": False}, False)])
def test_a_static_cache_is_made_where_nobody_asked_for_another(given: dict[str, Any], static: bool) -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    with tp.attach(model, UNIFORM, compile=TRACED):
        output = model.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **given)
    assert isinstance(output.get(CACHE), StaticCache) == static


def test_counts_of_graphs() -> None:
    graphs = Graphs()
    for made, known in ((0, False), (1, False), (2, False), (1, True), (0, True)):
        graphs.note(made, 0, known=known)
    assert graphs == Graphs(compiled=4, recompiles=2, calls=5), "one of two at once, and one for a known shape"


def test_text_without_pictures_passes_through() -> None:
    model = build("llava", layers=2)
    text = text_only_inputs("llava", model)
    plain = generate_logits(model, text)
    with tp.attach(model, UNIFORM, compile=TRACED) as attached:
        through = generate_logits(model, text)
        assert attached.report.graphs == Graphs(compiled=1, calls=5), "the decode step alone"
    assert torch.equal(plain[0], through[0]) and worst(plain[1], through[1]) < TOLERANCE


def test_detach_restores_the_forward() -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    text, tower = model.get_decoder(), model.model.vision_tower
    plain, before, of_tower = logits_of(model, batch), sorted(vars(text)), sorted(vars(tower))
    for asked in (UNIFORM, recipe("lattice", ADAPTIVE["stages"][0])):
        with tp.attach(model, asked, compile=TRACED):
            assert not torch.equal(logits_of(model, batch)[:, -1], plain[:, -1])
            assert sorted(vars(text)) != before and sorted(vars(tower)) != of_tower
        assert sorted(vars(text)) == before and sorted(vars(tower)) == of_tower
        assert all("forward" not in vars(layer) for layer in text.layers)
        assert torch.equal(logits_of(model, batch), plain)


def test_somebody_elses_forward_comes_back() -> None:
    model = build("llava", layers=2)
    for module in (model.get_decoder(), model.model.vision_tower):
        module.forward = own = module.forward
        with tp.attach(model, UNIFORM, compile=TRACED):
            assert module.forward is not own
        assert module.forward is own


def test_the_report_says_what_was_compiled() -> None:
    model = build("llava", layers=2)
    batch = inputs("llava", model)
    with tp.attach(model, UNIFORM, compile=TRACED) as attached:
        logits_of(model, batch)
    report = attached.report
    assert report.to_dict()["graphs"] == {"compiled": 2, "breaks": 0, "recompiles": 0, "calls": 2}
    assert report.to_dict()["seconds"] is None, "one graph has no clock inside"
    assert "compiled: 2 graphs, 0 breaks, 0 recompiles" in str(report)
    with tp.attach(model, UNIFORM) as attached:
        logits_of(model, batch)
    assert attached.report.to_dict()["graphs"] is None


def test_nan_activations_are_refused() -> None:
    model = build("llava", layers=2)
    model.get_decoder().layers[0].mlp.down_proj.weight.data.fill_(torch.nan)
    scored = recipe("scored", stage(1, fixed(0.5), scorer="norm"))
    with tp.attach(model, scored, compile=TRACED), pytest.raises(InputError, match="gave NaN scores"):
        logits_of(model, inputs("llava", model))


def test_what_cannot_be_traced_is_refused() -> None:
    model = build("llava", layers=2)
    model.get_decoder().norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with tp.attach(model, UNIFORM, compile=TRACED), pytest.raises(UnsupportedModelError, match="in one graph"):
        logits_of(model, inputs("llava", model))


def test_options_decided_here_are_refused() -> None:
    with pytest.raises(InputError, match=r"compile=\{'dynamic': ...\}\): graphs are always full and static"):
        tp.attach(build("llava", layers=2), UNIFORM, compile={"dynamic": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backnd": "eager"}, r"\{'backnd': ...\}\): expected one of backend, .*did you mean 'backend'"),
        ({"backend": "indctor"}, "Invalid backend: 'indctor'"),
        ({"mode": "fast"}, "Unrecognized mode=fast"),
        ({"options": {"max_autotun": 1}}, "Unexpected optimization option max_autotun$"),
    ],
)
def test_options_that_torch_does_not_take_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = build("llava", layers=2)
    with pytest.raises(InputError, match=message):
        tp.attach(model, UNIFORM, compile=options)
    tp.attach(model, UNIFORM).detach()


@pytest.mark.in_turn(2)
@pytest.mark.parametrize(("tower", "graphs"), [("siglip_vision_model", 2), ("pixtral", 1)])
def test_towers_of_other_types(tower: str, graphs: int) -> None:
    """Towers that are known to be one graph are compiled, others run as they are."""
    plain = build("llava", layers=2)
    sizes = {name: getattr(plain.config.vision_config, name) for name in ("hidden_size", "num_attention_heads")}
    config = copy.deepcopy(plain.config)
    config.vision_config = AutoConfig.for_model(
        tower, **sizes, intermediate_size=32, num_hidden_layers=2, image_size=20, patch_size=4
    )
    config.vision_feature_select_strategy = "full"
    model = type(plain)(config).eval()
    batch = inputs("llava", model, rows=[Row()])
    options = {"image_sizes": torch.tensor([[20, 20]])} if tower == "pixtral" else {}
    with tp.attach(model, UNIFORM):
        expected = model(**batch, **options).logits
    with tp.attach(model, UNIFORM, compile=TRACED) as attached:
        assert (model(**batch, **options).logits - expected).abs().max() < TOLERANCE
    assert attached.report.graphs == Graphs(compiled=graphs, calls=graphs)
