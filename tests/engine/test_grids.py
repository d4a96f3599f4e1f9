"""Where vision tokens lie on the pictures: read for parts that ask, right for every tower, and never a reason to refuse
a prompt whose parts do not ask."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from families import IMAGE, Batch, Row, build, inputs, row_inputs, vision_mask
from family_models.tiny import text
from kinds import ATTENTION, KINDS, fixed, recipe, stage
from pruned import TOLERANCE, logits_of, reference_stages, run_both, stage_results, worst
from reference import masked_reference
from torch import Tensor

import tokenprune as tp
from tokenprune.core.frames import frames_of
from tokenprune.core.grids import ClassToken, UnknownGrid
from tokenprune.core.needs import Needs
from tokenprune.core.signals import Unreadable
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.base import StaticScheduler
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage

UNIFORM = recipe("uniform", stage("after_vision", fixed(0.5), sampler="uniform"))
BY_NORM = recipe("norm", stage(2, fixed(0.5), scorer="norm"))
SIZES = ((20, 20), (12, 28))


def pixtral() -> Any:
    """LLaVA with a tower that takes pictures of any size: 4 x 4 pixels a token."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
    vision = tf.PixtralVisionConfig(num_hidden_layers=2, image_size=40, patch_size=4, **shape)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.MistralConfig(**text(sliding_window=None, num_hidden_layers=4)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def pixtral_prompt(rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Tensor]:
    """Samples of pictures of these sizes, a word behind each row of patches, padded on the left."""
    samples, every = [], [size for row in rows for size in row]
    for row in rows:
        ids = [3, 4]
        for height, width in row:
            ids += ([IMAGE] * (width // 4) + [189]) * (height // 4)
        samples.append([*ids, 7, 8, 9])
    longest = max(map(len, samples))
    ids = torch.tensor([[0] * (longest - len(sample)) + sample for sample in samples])
    pixels = torch.zeros(len(every), 3, 28, 28)
    random = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(every):
        pixels[number, :, :height, :width] = torch.randn(3, height, width, generator=random)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(every),
    }


def cells(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((1, height // 4, width // 4) for height, width in sizes)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_tower_of_any_size_has_the_grid_of_each_picture(options: dict[str, Any]) -> None:
    """Two pictures of as many tokens but another shape, samples in order, each of them repeated by beams."""
    model, rows = pixtral(), [SIZES, ((12, 28), (28, 12)), ((28, 12),)]
    with tp.attach(model, UNIFORM) as attached:
        model.generate(**pixtral_prompt(rows), max_new_tokens=2, **options)
    expected = [cells(row) for row in rows for _ in range(options.get("num_beams", 1))]
    assert attached.report.grids == tuple(expected)
    difference, (sequences, reference), _ = run_both(model, pixtral_prompt(rows), UNIFORM)
    assert difference < TOLERANCE and torch.equal(sequences, reference)


def test_sizes_that_do_not_fill_the_prompt_are_not_believed() -> None:
    model, prompt = pixtral(), pixtral_prompt([SIZES])
    embeddings = model.get_input_embeddings()(prompt["input_ids"])
    with tp.attach(model, UNIFORM), pytest.raises(InputError, match="pictures of several sizes without image_sizes"):
        model(inputs_embeds=embeddings, image_sizes=prompt["image_sizes"][:1])


def test_the_class_token_is_a_grid_of_its_own() -> None:
    """LLaVA with strategy "full": a class token before each picture."""
    config = copy.deepcopy(build("llava", layers=3).config)
    config.vision_feature_select_strategy, config.image_seq_length = "full", 26
    model = tf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.tensor([[3, 4] + [IMAGE] * 26 + [5] + [IMAGE] * 26 + [6, 7]])
    with tp.attach(model, UNIFORM) as attached, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 20, 20))
    assert attached.report.grids == ((ClassToken(), (1, 5, 5)) * 2,)
    first, second = frames_of(attached.report.grids[0], 2)
    assert (first.start, second.start, second.width) == (1, 27, 5)


def test_without_token_types_the_grids_of_the_call_are_taken() -> None:
    model = build("qwen2_5_vl", layers=3)
    batch = dict(inputs("qwen2_5_vl", model))
    del batch["mm_token_type_ids"]
    with tp.attach(model, UNIFORM) as attached:
        model.generate(**batch, max_new_tokens=2)
    assert attached.report.grids == (((1, 4, 4),), ((1, 2, 10), (1, 4, 4)))
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    model.model.rope_deltas = None
    with tp.attach(model, UNIFORM), pytest.raises(InputError, match="position ids of words: pass mm_token_type_ids"):
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])


# ------------------------------------------------------------------------------------ who asks, and who does not


def half_hidden(family: str, model: Any) -> dict[str, Tensor]:
    """A sample in which the attention mask hides a part of the picture."""
    batch = dict(inputs(family, model, rows=[Row()]))
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, :7] = 0
    return batch


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_who_reads_no_grid_runs_without_one(family: str) -> None:
    model = build(family, layers=4)
    batch = half_hidden(family, model)
    n = int((batch["input_ids"] == IMAGE).sum()) - 4
    plain = logits_of(model, batch)
    for harmless in (recipe("none"), {**UNIFORM, "budget": {"keep": 1.0}}):
        with tp.attach(model, harmless) as attached:
            assert torch.equal(logits_of(model, batch), plain)
        assert attached.report.grids == ((UnknownGrid(1, 1, n),),)
    with tp.attach(model, BY_NORM) as attached, stage_results(attached) as results:
        logits = logits_of(model, batch)
    shown = vision_mask(model, batch["input_ids"]) & batch["attention_mask"].bool()
    with masked_reference(model, shown, reference_stages(attached.report, results)):
        assert worst((logits[:, -7:],), (logits_of(model, batch)[:, -7:],)) < TOLERANCE
    with tp.attach(model, UNIFORM), pytest.raises(InputError, match=f"mask hides 4 of {n + 4} vision tokens"):
        logits_of(model, batch)


def test_a_budget_in_multiply_adds_asks_unless_it_keeps_everything() -> None:
    model = build("qwen3_vl", layers=4)
    ids = inputs("qwen3_vl", model, rows=[Row()])["input_ids"]
    batch = {"inputs_embeds": model.get_input_embeddings()(ids)}  # no picture, so words' position ids
    with tp.attach(model, BY_NORM, flops=0.9), pytest.raises(InputError, match=r"not known: .* position ids of words"):
        logits_of(model, batch)
    plain = logits_of(model, batch)
    with tp.attach(model, BY_NORM, flops=1.0):
        assert torch.equal(logits_of(model, batch), plain)


class Cells(TopKSampler):
    """Reads where tokens lie, and does not say so."""

    def forward(self, tokens: Tokens, scores: Tensor, count: Any) -> Tensor:
        return super().forward(tokens, scores + tokens.cell[..., 1], count)


class Rows(StaticScheduler):
    """One token for each row of the pictures; says so or not."""

    def __init__(self, *, says: bool = True) -> None:
        super().__init__()
        self.says = says

    @property
    def reads(self) -> Needs:
        return Needs(grid=self.says)

    def count(self, size: int, *, total: int, grids: Any) -> int:
        return min(size, sum(rows for _, rows, _ in grids))


def test_who_reads_cells_or_grids_declares_it() -> None:
    model = build("llava", layers=3)
    batch = inputs("llava", model)
    undeclared = [
        Pipeline([Stage(place=1, scheduler=Rows(), sampler=Cells())], depth=3),
        Pipeline([Stage(place=1, scheduler=Rows(says=False))], depth=3),
    ]
    for pipeline, reader in zip(undeclared, ("Cells|cells", "a scheduler of pipeline"), strict=True):
        with tp.attach(model, pipeline), pytest.raises(InputError, match=rf"({reader}).* reads the grids .*grid=True"):
            logits_of(model, batch)
    with tp.attach(model, Pipeline([Stage(place=1, scheduler=Rows())], depth=3)) as attached:
        logits_of(model, batch)
    assert attached.report.vision_tokens[:, -1].tolist() == [5, 10]


def test_a_static_scheduler_alone_is_held_to_it_too() -> None:
    tokens = Tokens.from_hidden(torch.randn(2, 9, 4))
    with pytest.raises(InputError, match=r"rows.* reads the grids of the pictures.*grid=True"):
        Stage(place=1, scheduler=Rows(says=False))(tokens)
    assert Stage(place=1, scheduler=Rows())(tokens).tokens.sizes == (3, 3)


def test_no_cells_are_made_for_nobody() -> None:
    model = build("llava", layers=3)
    with tp.attach(model, recipe("n", stage(1, fixed(0.5), scorer="norm"))) as attached:
        seen: list[Any] = []
        attached.engine.pipeline.stages[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].cell))
        logits_of(model, inputs("llava", model))
    assert isinstance(seen[0], Unreadable)


# ------------------------------------------------------------------------------------------------ nobody to rate


def masked_question(model: Any) -> Batch:
    """Two samples, the second's text behind its picture hidden by the attention mask."""
    batch = inputs("llava", model, rows=[Row(), Row(before=5, after=5)])
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][1, -5:] = 0
    return batch


@pytest.mark.parametrize("kind", ["attention", "adaptive"])
def test_a_sample_without_raters_falls_back_and_is_told(kind: str) -> None:
    model = build("llava")
    batch = masked_question(model)
    with tp.attach(model, KINDS[kind]) as attached:
        pruned = logits_of(model, batch)
        told = attached.report
        assert told.unrated == (1,) and "sample 1: 25 vision tokens, no text behind" in str(told)
        assert "no text" not in str(told).split("sample 1")[0] and told.to_dict()["unrated"] == [1]
        kept = [stage.kept[0] for stage in told.stages]
        alone = logits_of(model, row_inputs(batch, 0))
        assert attached.report.unrated == ()
        for both, one in zip(kept, attached.report.stages, strict=True):
            assert torch.equal(both[both >= 0], one.kept[0])
    assert (pruned[0, -7:] - alone[0, -7:]).abs().max() < TOLERANCE
    difference, _, _ = run_both(model, batch, KINDS[kind])
    assert difference < TOLERANCE


def test_the_last_token_stands_in_for_missing_raters() -> None:
    """What a sample without raters keeps is what its last vision token looks at most."""
    model = build("llava", layers=3)
    asking = recipe("last", stage(1, fixed(6), raters="last_text", scorer=ATTENTION))
    batch = masked_question(model)
    with tp.attach(model, asking) as attached:
        logits_of(model, batch)
    alone = {name: batch[name][1:, :-5] for name in ("input_ids", "attention_mask")}
    alone = {name: value[:, batch["attention_mask"][1, :-5] > 0] for name, value in alone.items()}
    eager = build("llava", layers=3, attention="eager")
    with torch.no_grad():
        seen = eager(**alone, pixel_values=batch["pixel_values"][1:], output_attentions=True).attentions[0]
    looked = seen[0].mean(0)[-1, 5:30]
    assert attached.report.stages[0].kept[1].tolist() == sorted(looked.topk(6).indices.tolist())


def test_a_sample_without_raters_alone_keeps_what_it_keeps_in_a_batch() -> None:
    """A part without raters reads the same question, where the stage with raters has nothing to drop."""
    model = build("llava", layers=4)
    reads = stage(1, fixed(6), scorer={"type": "question", "words": "mean"})
    asked = recipe("both", reads, stage(2, fixed(8), raters="last_text", scorer=ATTENTION))
    batch = inputs("llava", model, rows=[Row(before=3, after=7), Row(before=9, after=0)])
    with tp.attach(model, asked) as attached:
        logits_of(model, batch)
        assert attached.report.unrated == (1,)
        together = attached.report.stages[0].kept[1]
        logits_of(model, row_inputs(batch, 1))
        assert attached.report.unrated == (0,)
    assert together.tolist() == attached.report.stages[0].kept[0].tolist()


def test_nobody_to_rate_refuses_only_what_would_drop() -> None:
    model = build("llava", layers=6)
    batch = inputs("llava", model, rows=[Row(before=9, after=0)])
    plain = logits_of(model, batch)
    with tp.attach(model, KINDS["attention"], keep=1.0) as attached:
        assert torch.equal(logits_of(model, batch), plain)
    assert attached.report.unrated == (0,)
    with tp.attach(model, KINDS["attention"]), pytest.raises(InputError, match="sample 0: no text token follows"):
        logits_of(model, batch)
