"""Training: resumable, stage by stage, and its parts do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokenprune.scenes import stages, train
from tokenprune.scenes.alignment import FIELDS, Teacher, vision_labels
from tokenprune.scenes.batches import symbolic_choice, training_batch
from tokenprune.scenes.generate import TEST_SEEDS, scene
from tokenprune.scenes.model import build_config, build_model
from tokenprune.scenes.muon import orthogonalise
from tokenprune.scenes.vocabulary import token_ids

SMALL = tuple(replace(stage, batch=2) for stage in stages.STAGES)
PLAN = train.Plan(seed=3, steps={"language": 2, "alignment": 2, "instruction": 2}, precision="fp32")


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
    for changes in ({"language_model", "lm_head"}, {"vision_tower", "multi_modal_projector"}):
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train_step()
        moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
        assert moved and all(any(part in name for part in changes) for name in moved)
        assert not any("embed_tokens" in name for name in moved)
        trainer.next_stage()


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
    assert labels.shape == (144, len(FIELDS)) and labels[place, 6] == 1
    expected = sum(embedding[ids[word]] for word in (thing.colour, thing.shape, thing.size))
    expected = (
        expected + teacher.code_row[thing.row - 1] + teacher.code_column[thing.column - 1] + teacher.code_centre[0]
    )
    torch.testing.assert_close(teacher.targets(labels, embedding)[place], expected)
    ground = int((labels[:, 3] > 0).nonzero()[0])
    torch.testing.assert_close(teacher.targets(labels, embedding)[ground], embedding[ids[item.ground]])


def test_symbols_contain_every_object_and_the_ground() -> None:
    labels = training_batch(0, 500, 16, pixels=False).labels
    chosen = symbolic_choice(labels, 24, torch.Generator().manual_seed(0))
    assert (chosen.diff(dim=1) > 0).all()
    picked = labels.gather(1, chosen[..., None].expand(-1, -1, labels.shape[-1]))
    assert torch.equal((picked[..., 6] > 0).sum(1), (labels[..., 6] > 0).sum(1))
    assert ((picked[..., 3] > 0).sum(1) > 0).all()
