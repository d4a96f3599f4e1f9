"""Training: resumable, phase by phase, and its parts do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenprune.scenes.training import log, train, trainer
from tokenprune.scenes.training.alignment import EDGES, FIELDS, Teacher, vision_labels
from tokenprune.scenes.training.model import build_config, build_model
from tokenprune.scenes.training.muon import Muon, orthogonalise
from tokenprune.scenes.training.phases import PHASES
from tokenprune.scenes.training.texts import LENGTH, texts
from tokenprune.scenes.training.trainer import Plan, Trainer, make_plan
from tokenprune.scenes.world.boxes import bin_of
from tokenprune.scenes.world.generate import TEST_SEEDS, scene
from tokenprune.scenes.world.plates import LETTERS
from tokenprune.scenes.world.vocabulary import token_ids

COLUMN = {name: number for number, name in enumerate(FIELDS)}
SMALL = tuple(replace(phase, batch=min(phase.batch, 2), texts=min(phase.texts, 2)) for phase in PHASES)
PLAN = Plan(seed=3, steps={phase.name: 2 for phase in SMALL}, precision="fp32", lags="recent")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model and phases, two scenes a step and two decoder layers."""
    for module in (log, train, trainer):
        monkeypatch.setattr(module, "PHASES", SMALL)
    monkeypatch.setattr(trainer, "build_model", lambda seed: build_model(build_config(layers=2), seed=seed))


@pytest.mark.usefixtures("small")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Trainer(PLAN, torch.device("cpu"))
    train.run(whole, tmp_path)
    assert _logged(tmp_path) == [(phase.name, 2) for phase in SMALL]

    first = Trainer(PLAN, torch.device("cpu"))
    for _ in range(2):
        first.train_step()
    first.next_phase()
    first.train_step()
    train.save(first, tmp_path / "half.pt")
    second = Trainer(PLAN, torch.device("cpu"))
    second.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    train.run(second, tmp_path)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert _logged(tmp_path) == [(phase.name, 2) for phase in SMALL]


def _logged(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


@pytest.mark.usefixtures("small")
def test_phases_train_what_they_say() -> None:
    training = Trainer(PLAN, torch.device("cpu"))
    decoder, vision = {"language_model", "lm_head"}, {"vision_tower", "multi_modal_projector"}
    for changes in (decoder, decoder, vision):
        before = {name: value.clone() for name, value in training.model.named_parameters()}
        training.train_step()
        moved = {name for name, value in training.model.named_parameters() if not torch.equal(value, before[name])}
        assert moved and all(any(part in name for part in changes) for name in moved)
        assert not any("embed_tokens" in name for name in moved)
        training.next_phase()


@pytest.mark.usefixtures("small")
def test_the_decoder_learns_at_its_share_of_the_rate_in_the_last_phase() -> None:
    training = Trainer(PLAN, torch.device("cpu"))
    for _ in SMALL[:-1]:
        training.next_phase()
    rate, _, _ = training.train_step()
    phase = training.phase
    assert 0 < phase.decoder < phase.vision
    for optimiser in (training.optimisers.muon, training.optimisers.adam):
        assert [group["lr"] for group in optimiser.param_groups] == [rate * phase.decoder, rate * phase.vision]


@pytest.mark.usefixtures("small")
def test_a_run_without_texts_skips_them(tmp_path: Path) -> None:
    plan = replace(make_plan(3, "fp32", "none"), steps=PLAN.steps | {"text": 0})
    assert make_plan(3, "fp32", "none").steps["text"] == 0 < make_plan(3, "fp32").steps["text"]
    train.run(Trainer(plan, torch.device("cpu")), tmp_path)
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


@pytest.mark.parametrize("shape", [(128, 128), (128, 256), (384, 128)])
def test_muon_is_that_of_torch_but_for_bfloat16(shape: tuple[int, int]) -> None:
    """Learning rate, momentum, decay and iteration are the same: what differs is the rounding of bfloat16, 2^-8."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = Muon([ours], lr=0.1)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        muon.step()
        torchs.step()
        update, expected = ours.detach() - before[0], theirs.detach() - before[1]
        assert (update - expected).norm() < 0.03 * expected.norm()


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
