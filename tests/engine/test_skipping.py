"""`dropped: skip_ffn`: dropped tokens stay for vision tokens to see, and pass by the feed-forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import CACHE, MODELS, Row, build, inputs, row_inputs, vision_mask
from kinds import KINDS, fixed, recipe, skipping, stage
from pruned import TOLERANCE, logits_of, reference_stages, run_both, snapshot, stage_results, two_turns, worst
from reference import generate_logits, masked_reference, reference_logits

import tokenprune as tp
from tokenprune.engine.skipping import Skipping
from tokenprune.errors import UnsupportedModelError
from tokenprune.families.anatomy import RECURRENT


def last_skips(name: str, **more: Any) -> dict[str, Any]:
    """A recipe of `KINDS` whose last stage lets its tokens skip."""
    made = copy.deepcopy(KINDS[name])
    made["stages"][-1] |= {"dropped": "skip_ffn", "positions": "original", **more}
    return made


ONE = skipping(3)
RECIPES = {
    "one": ONE,
    "first": skipping("after_vision"),
    "merging": skipping(2, 0.3, scorer="norm", recycler={"type": "cluster", "share": 0.2, "per_cluster": 2}),
    "attention": last_skips("attention"),
    "adaptive": skipping(3, {"type": "threshold", "above": 0.5}),
    "everywhere": skipping(3, kv="all_layers"),
    "behind": recipe(
        "behind",
        stage("after_vision", fixed(0.7), scorer="random", recycler={"type": "cluster", "share": 0.2}),
        stage(4, fixed(0.3), scorer="norm", dropped="skip_ffn"),
    ),
    "behind everywhere": recipe(
        "behind",
        stage(2, fixed(0.7), scorer="random"),
        stage(4, fixed(0.3), scorer="norm", dropped="skip_ffn", kv="all_layers"),
    ),
    "same layer": recipe(
        "same",
        stage(2, {"type": "threshold", "above": 0.3}, scorer="random", rectifier="log_mass", recycler="cluster"),
        stage(2, fixed(4), scorer="norm", dropped="skip_ffn"),
    ),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llava", kind) for kind in RECIPES),
        ("llava_next", "merging"),
        ("qwen2_5_vl", "merging"),
        ("qwen2_5_vl", "behind"),
        ("qwen3_vl", "first"),  # DeepStack
        ("qwen3_vl_moe", "one"),  # experts
        ("gemma3", "merging"),  # windows, pictures in both directions, norms behind the feed-forward
        ("gemma3", "everywhere"),
        ("cohere2_vision", "one"),  # attention and feed-forward side by side
        ("glm4v", "one"),
    ],
)
def test_decoding_equals_the_masked_reference(family: str, kind: str) -> None:
    model = build(family)
    batch = inputs(family, model)
    difference, (got, expected), report = run_both(model, batch, RECIPES[kind])
    assert difference < TOLERANCE
    assert torch.equal(got, expected)
    assert report.stages[-1].skips


EARLY = skipping(1, 0.3, scorer="norm", recycler={"type": "cluster", "share": 0.2, "per_cluster": 2})
"""For models of four layers: what skips is read by the others in one, and they by text in the next."""


@pytest.mark.parametrize("mode", ["static", "beams", "eager", "no cache", "lookup", "chunks"])
def test_modes_equal_the_masked_reference(mode: str) -> None:
    model = build("llava", attention="eager" if mode == "eager" else "sdpa", layers=4)
    options: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 3},
        "no cache": {"use_cache": False},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "chunks": {"prefill_chunk_size": 16},
    }.get(mode, {})
    alone = mode in ("lookup", "no cache")  # without padding, no mask is made
    batch = inputs("llava", model, rows=[Row()] if alone else None)
    expand = 3 if mode == "beams" else 1
    if mode == "chunks":  # the reference reads the prompt as a whole
        with tp.attach(model, EARLY):
            got, logits = generate_logits(model, batch, **options)
        _, (_, expected), _ = run_both(model, batch, EARLY)
        with tp.attach(model, EARLY):
            difference = worst(logits, generate_logits(model, batch)[1])
    else:
        difference, (got, expected), _ = run_both(model, batch, EARLY, expand=expand, **options)
    assert difference < TOLERANCE
    assert torch.equal(got, expected)


def test_a_layer_is_what_the_paper_says() -> None:
    """Read off the layer's own modules, without a word of the engine's: attention and residual for those that skip."""
    model = build("llava", layers=3)
    batch = inputs("llava", model, rows=[Row()])
    vision = vision_mask(model, batch["input_ids"])[0].nonzero()[:, 0]
    layer = model.get_decoder().layers[1]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.update(attended=args[0])),
        layer.register_forward_hook(lambda module, args, output: seen.update(out=output)),
    ]
    with torch.no_grad(), tp.attach(model, skipping(1)) as attached:
        model(**batch)
        kept = vision[attached.report.stages[0].kept[0]]
    for hook in hooks:
        hook.remove()
    gone = torch.tensor([place for place in vision.tolist() if place not in kept.tolist()])
    attended = seen["attended"]
    assert len(gone) == len(vision) - 6
    assert torch.equal(seen["out"][:, gone], attended[:, gone])
    whole = attended + layer.mlp(layer.post_attention_layernorm(attended))
    others = torch.tensor([place for place in range(attended.shape[1]) if place not in gone.tolist()])
    assert (seen["out"][:, others] - whole[:, others]).abs().max() < TOLERANCE
    assert (seen["out"][:, gone] - whole[:, gone]).abs().max() > 100 * TOLERANCE


def test_text_does_not_see_those_that_skip_and_vision_tokens_do() -> None:
    """A change in what skips moves what vision tokens behind it read, and text only by way of them."""
    model = build("llava", layers=2)
    batch = inputs("llava", model, rows=[Row(after=4)])
    vision = vision_mask(model, batch["input_ids"])[0].nonzero()[:, 0]
    layers = model.get_decoder().layers
    told = skipping(1, 5, scorer="constant", sampler="uniform")
    outputs = []
    for moved in (0.0, 1.0):
        seen: dict[str, Any] = {}
        with torch.no_grad(), tp.attach(model, told) as attached:

            def move(module: Any, args: Any, kwargs: Any, moved: float = moved) -> Any:
                hidden = args[0].clone()
                hidden[:, vision[0] + 1] += moved  # the second token, which an even choice of 5 in 25 leaves out
                return (hidden, *args[1:]), kwargs

            hook = layers[1].register_forward_pre_hook(move, with_kwargs=True)
            after = layers[1].register_forward_hook(lambda module, args, output, seen=seen: seen.update(out=output))
            model(**batch)
            hook.remove()
            after.remove()
            kept = vision[attached.report.stages[0].kept[0]]
        assert vision[0] + 1 not in kept
        outputs.append(seen["out"][0])
    difference = (outputs[0] - outputs[1]).abs().amax(-1)
    text = torch.arange(int(vision[-1]) + 1, len(difference))
    assert difference[text].max() == 0
    assert difference[kept[kept > vision[0] + 1]].min() > 100 * TOLERANCE


def test_feed_forwards_run_for_the_others_alone() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model, rows=[Row()])
    length, sizes = batch["input_ids"].shape[1], []
    with torch.no_grad(), tp.attach(model, skipping(2)) as attached:
        hooks = [
            layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
            for layer in model.get_decoder().layers
        ]
        cache = model(**batch, use_cache=True)[CACHE]
        total = attached.report.total[0]
        stored = [layer.keys.shape[-2] for layer in cache.layers]
        reported = [layer.get_seq_length() for layer in cache.layers]
    for hook in hooks:
        hook.remove()
    short = length - total + 6
    assert sizes == [length, length, short, short]
    assert stored == [length, length, short, short]
    assert reported == [length] * 4
    assert attached.report.vision_tokens[0].tolist() == [total] * 4
    assert attached.report.feed_forward_tokens[0].tolist() == [total, total, 6, 6]
    told = attached.report.to_dict()
    assert told["feed_forward_tokens"] == [[total, total, 6, 6]]
    assert f"6 kept, {total - 6} skip the feed-forward" in str(attached.report)


def test_keeping_everything_is_bit_identical() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    _, plain = generate_logits(model, batch)
    with tp.attach(model, skipping(2, 1.0, scorer="norm", recycler="cluster")):
        _, kept = generate_logits(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("kind", ["adaptive", "merging"])
def test_a_row_of_a_batch_equals_the_sample_alone(kind: str) -> None:
    model = build("qwen2_5_vl", layers=4)
    batch = inputs("qwen2_5_vl", model)
    with tp.attach(model, RECIPES[kind]):
        _, together = generate_logits(model, batch)
        for row in range(2):
            _, alone = generate_logits(model, row_inputs(batch, row))
            assert worst(tuple(each[row : row + 1] for each in together), alone) < TOLERANCE


def test_nothing_is_left_behind() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    plain = logits_of(model, batch)
    before = snapshot(model)
    with tp.attach(model, skipping(2)):
        generate_logits(model, batch)
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert torch.equal(logits_of(model, batch), plain)


def test_a_second_turn_goes_on_from_it() -> None:
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    (sequences, logits), (wanted, expected), _ = two_turns(model, batch, skipping(1))
    assert torch.equal(sequences, wanted)
    assert worst(logits, expected) < TOLERANCE


def test_a_loss_is_that_of_the_masked_reference() -> None:
    """Nothing leaves the sequence and text sees the same wherever it comes, so labels need no care."""
    model = build("llava", layers=4)
    batch = inputs("llava", model)
    with torch.no_grad(), tp.attach(model, skipping(1)) as attached, stage_results(attached) as results:
        loss = model(**batch, labels=batch["input_ids"]).loss
        stages = reference_stages(attached.report, results)
    expected = reference_logits(model, batch, stages)[:, :-1]
    wanted = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert abs(loss - wanted) < TOLERANCE


def test_gradients_are_those_of_the_masked_reference() -> None:
    model = build("llava", layers=4).train()
    batch = inputs("llava", model)
    found = []
    for recipes in (skipping(1), None):
        model.zero_grad()
        pixels = batch["pixel_values"].clone().requires_grad_()
        if recipes is not None:
            with tp.attach(model, recipes) as attached, stage_results(attached) as results:
                model(**{**batch, "pixel_values": pixels}).logits[:, -3:].square().sum().backward()
                stages = reference_stages(attached.report, results)
        else:
            with masked_reference(model, vision_mask(model, batch["input_ids"]), stages):
                model(**{**batch, "pixel_values": pixels}).logits[:, -3:].square().sum().backward()
        found.append([pixels.grad, *(weight.grad.clone() for weight in model.get_decoder().layers[2].parameters())])
    assert found[0][0].abs().sum() > 0
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MODELS))
def test_every_family_gives_it_or_is_refused(family: str) -> None:
    model = build(family, layers=4)
    if set(getattr(model.config.get_text_config(), "layer_types", None) or ()) & RECURRENT:
        with pytest.raises(UnsupportedModelError, match="is recurrent"):
            tp.attach(model, EARLY)
        return
    difference, (got, expected), _ = run_both(model, inputs(family, model), EARLY)
    assert difference < TOLERANCE
    assert torch.equal(got, expected)


def test_what_a_feed_forward_returns_beside_its_rows_stays() -> None:
    """As mixtures of experts of older releases return what their router says."""

    class Told(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
            return 2 * hidden_states, hidden_states.shape[1]

    model = build("llava", layers=2)
    tokens = tp.Tokens.from_hidden(torch.randn(1, 6, 4), grid=(1, 6))
    kept = tokens.take(torch.tensor([[1, 4]]), (2,))
    with tp.attach(model, skipping(1)) as attached:
        feeds, module = attached.engine.feed_forwards, Told()
        skips = Skipping.behind(tokens, kept, None, torch.empty(1, 6), [6])
        feeds._skipping = lambda: skips
        module.register_forward_pre_hook(feeds._before, with_kwargs=True)
        module.register_forward_hook(feeds._after)
        for call in ({"hidden_states": tokens.hidden}, None):
            rows, told = module(**call) if call else module(tokens.hidden)
            assert told == 2
            assert torch.equal(rows[:, [1, 4]], 2 * tokens.hidden[:, [1, 4]])
            assert not rows[:, [0, 2, 3, 5]].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_flex_attention_equals_sdpa(family: str) -> None:
    answers = []
    with torch.compiler.set_stance("force_eager"):  # compiling its masks takes minutes on a CPU
        for attention in ("sdpa", "flex_attention"):
            model = build(family, attention=attention, layers=4)  # type: ignore[arg-type]
            with tp.attach(model, EARLY):
                answers.append(generate_logits(model, inputs(family, model), max_new_tokens=3))
    (expected, logits), (got, others) = answers
    assert torch.equal(got, expected)
    assert worst(logits, others) < TOLERANCE
