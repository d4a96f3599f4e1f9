"""Training: resumable, stage by stage, and its parts do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenprune.scenes.training import phases, train
from tokenprune.scenes.training.alignment import EDGES, FIELDS, Teacher, vision_labels
from tokenprune.scenes.training.model import build_config, build_model
from tokenprune.scenes.training.muon import orthogonalise
from tokenprune.scenes.training.texts import LENGTH, texts
from tokenprune.scenes.world.boxes import bin_of
from tokenprune.scenes.world.generate import TEST_SEEDS, scene
from tokenprune.scenes.world.plates import LETTERS
from tokenprune.scenes.world.vocabulary import token_ids

COLUMN = {name: number for number, name in enumerate(FIELDS)}
SMALL = tuple(replace(stage, batch=min(stage.batch, 2), texts=min(stage.texts, 2)) for stage in phases.STAGES)
PLAN = train.Plan(seed=3, steps={stage.name: 2 for stage in SMALL}, precision="fp32", lags="recent")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model and stages, two scenes a step and two decoder layers."""
    monkeypatch.setattr(train, "STAGES", SMALL)
    monkeypatch.setattr(train, "build_model", lambda seed: build_model(build_config(layers=2), seed=seed))


@pytest.mark.usefixtures("small")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train.Trainer(PLAN, torch.device("cpu"))
    train.run(whole, tmp_path)
    assert _logged(tmp_path) == [(stage.name, 2) for stage in SMALL]

    first = train.Trainer(PLAN, torch.device("cpu"))
    for _ in range(2):
        first.train_step()
    first.next_stage()
    first.train_step()
    train.save(first, tmp_path / "half.pt")
    second = train.Trainer(PLAN, torch.device("cpu"))
    second.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    train.run(second, tmp_path)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert _logged(tmp_path) == [(stage.name, 2) for stage in SMALL]


def _logged(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


@pytest.mark.usefixtures("small")
def test_stages_train_what_they_say() -> None:
    trainer = train.Trainer(PLAN, torch.device("cpu"))
    decoder, vision = {"language_model", "lm_head"}, {"vision_tower", "multi_modal_projector"}
    for changes in (decoder, decoder, vision):
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train_step()
        moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
        assert moved and all(any(part in name for part in changes) for name in moved)
        assert not any("embed_tokens" in name for name in moved)
        trainer.next_stage()


@pytest.mark.usefixtures("small")
def test_the_decoder_learns_at_its_share_of_the_rate_in_the_last_stage() -> None:
    trainer = train.Trainer(PLAN, torch.device("cpu"))
    for _ in SMALL[:-1]:
        trainer.next_stage()
    rate, _, _ = trainer.train_step()
    stage = trainer.stage
    assert 0 < stage.decoder < stage.vision
    for optimiser in (trainer.optimisers.muon, trainer.optimisers.adam):
        assert [group["lr"] for group in optimiser.param_groups] == [rate * stage.decoder, rate * stage.vision]


@pytest.mark.usefixtures("small")
def test_a_run_without_texts_skips_them(tmp_path: Path) -> None:
    plan = replace(train.make_plan(3, "fp32", "none"), steps=PLAN.steps | {"text": 0})
    assert train.make_plan(3, "fp32", "none").steps["text"] == 0 < train.make_plan(3, "fp32").steps["text"]
    train.run(train.Trainer(plan, torch.device("cpu")), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["language", "alignment", "instruction"]
    assert not any("text" in line["loss"] for line in lines)


def test_texts_repeat_recent_words() -> None:
    """Lags of repeated words: at small lags far above the flat control's share, and reproducible."""
    recent, flat = texts(0, 7, 64, "recent"), texts(0, 7, 64, "uniform")
    assert recent.shape == (64, LENGTH + 1) and (recent[:, 0] == token_ids()["<s>"]).all()
    assert (recent == texts(0, 7, 64, "recent")).all() and not (recent == texts(0, 8, 64, "recent")).all()
    near, far = (
        [float(np.mean(made[:, 101:] == made[:, 101 - lag : -lag])) for lag in lags]
        for made in (np.concatenate([recent, texts(0, 9, 192, "recent")]),)
        for lags in ((1, 2), (30, 40, 50))
    )
    assert min(near) > 1.6 * max(far)
    even = [float(np.mean(flat[:, 101:] == flat[:, 101 - lag : -lag])) for lag in (1, 2, 30, 40, 50)]
    assert max(even) < 1.4 * min(even)
    with pytest.raises(ValueError, match="lags"):
        texts(0, 0, 1, "none")


def test_orthogonalise_flattens_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.35


def test_targets_are_sums_of_word_embeddings() -> None:
    item, ids = scene(TEST_SEEDS[7], 0), token_ids()
    labels = torch.from_numpy(vision_labels(item))
    embedding = torch.randn(len(ids), 16)
    teacher = Teacher(width=16, vision_width=8)
    thing = item.objects[0]
    place = int(thing.y // 8) * 12 + int(thing.x // 8)
    assert labels.shape == (144, len(FIELDS)) and labels[place, COLUMN["centre"]] == 1
    expected = sum(embedding[ids[word]] for word in (thing.colour, thing.shape, thing.size))
    expected = expected + teacher.code_row[thing.row - 1] + teacher.code_column[thing.column - 1]
    expected = expected + teacher.code_centre[0]
    for edge, where in zip(EDGES, thing.box, strict=True):
        expected = expected + getattr(teacher, f"code_{edge}")[bin_of(where)]
    torch.testing.assert_close(teacher.targets(labels, embedding)[place], expected)
    ground = int((labels[:, COLUMN["ground"]] > 0).nonzero()[0])
    torch.testing.assert_close(teacher.targets(labels, embedding)[ground], embedding[ids[item.ground]])


def test_labels_show_every_letter_of_a_code_and_nothing_else_there() -> None:
    plated = [item for index in range(30) if (item := scene(TEST_SEEDS[7], index)).plate is not None]
    assert len(plated) > 10
    for item in plated:
        labels = vision_labels(item)
        letters = {}
        for row in labels[labels[:, COLUMN["slot"]] > 0]:
            letters.setdefault(int(row[COLUMN["slot"]]), set()).add(LETTERS[row[COLUMN["letter"]] - 1])
            assert not row[[COLUMN[name] for name in ("colour", "shape", "size", "ground", "centre")]].any()
        assert letters == {slot: {letter} for slot, letter in enumerate(item.plate.code, start=1)}
        assert (labels[:, COLUMN["centre"]] > 0).sum() == len(item.objects)
