"""`fit`: learned parts of a recipe get weights for one model, which stays frozen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from tokenprune.core.files import only_one, whole_file
from tokenprune.engine.weights import host_of
from tokenprune.errors import InputError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat
from tokenprune.fitting.fresh import without_weights
from tokenprune.fitting.lessons import Asked, box_of, lesson, with_boxes
from tokenprune.fitting.plan import Plan
from tokenprune.recipe import Recipe, load_recipe

Progress = Callable[[int, int, float], None]
"""Told after every step: steps done, all steps, the loss. Before, while a request's questions are asked, how many of
them are, all of them, and NaN."""


@dataclass(frozen=True)
class Fitted:
    """What a fit has made."""

    recipe: Path
    """A recipe that names the weights."""
    weights: tuple[Path, ...]
    """Their files, beside it."""
    losses: tuple[float, ...]
    """Of every step."""
    looks: tuple[tuple[int, float], ...]
    """Step and loss on the held-out questions."""
    best: int
    """The step whose weights were taken."""


def fit(
    model: Any,
    processor: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    data: Sequence[Asked],
    folder: str | Path,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train the learned parts of `recipe` on a frozen model; stopped at any time, the same call goes on.

    Of a recipe that asks again, what learns is the request for the full picture.

        fitted = fit(model, processor, "text-conditioned", cases, "runs/mine")
        with tp.attach(model, fitted.recipe, keep=0.2):
            ...

    Args:
        model: a supported model; it stays as it is, bit for bit.
        processor: that speaks to it.
        recipe: with at least one learned part.
        data: pictures and questions, without answers; for the aim ``boxes`` those with a ``target`` count.
        folder: for the weights, the recipe that names them, the log and the checkpoint.
        plan: what to do; the usual for the recipe when left out.
        progress: told after every step, and while questions are asked before the first one.

    Raises:
        RecipeError: the recipe has no learned part.
        InputError: too little data, no boxes where they are the aim, an aim of another recipe, or a folder that holds
            another fit, or in which one runs.
    """
    loaded = load_recipe(recipe)
    plan = plan or Plan.usual(loaded)
    chat = Chat("", model, processor)
    run = _Run(chat, loaded, data, Path(folder), plan)
    with run.alone(), _frozen(model):
        run.resume()
        run.prepare(progress)
        run.train(progress)
        return run.write()


class _Run:
    """A fit on its way."""

    def __init__(self, chat: Chat, recipe: Recipe, data: Sequence[Asked], folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        host = host_of(anatomy(chat.model))
        data = with_boxes(data) if plan.aim == "boxes" else data
        self.lesson = lesson(chat, recipe, plan, host, data)
        self.learner = nn.ModuleDict(dict(self.lesson.parts)).to(chat.model.device).requires_grad_(True)
        self.train_on, self.held_out = _split(data, plan)
        self.prepared: dict[int, Any] = {}
        self.optimiser = torch.optim.AdamW(self.learner.parameters(), lr=plan.rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, plan.rate, total_steps=plan.steps)
        self.step = 0
        self.losses: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self.best: dict[str, Any] = {}
        bare = without_weights(recipe).fingerprint
        self.about = {"plan": plan.to_dict(), "recipe": bare, "data": _digest(data, plan), "host": str(host)}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The folder is there, and no other fit runs in it within the block: two would overwrite each other's files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with only_one(self.folder) as free:
            if not free:
                raise InputError(f"{self.folder}: another fit runs in it; let it end, or choose another folder")
            yield

    def prepare(self, progress: Progress | None) -> None:
        """Whatever has to be known of the questions that will be trained on, and of those that are held out."""
        drawn = sorted({index for step in range(self.plan.steps) for index in self._drawn(step)[0]})

        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, float("nan"))

        asked = [*(self.train_on[index] for index in drawn), *self.held_out]
        made = self.lesson.prepare(asked, self.folder, told)
        self.prepared = dict(zip(drawn, made, strict=False))
        self.looked_at = made[len(drawn) :]

    def train(self, progress: Progress | None) -> None:
        """Every step that is not done yet, a look at the held-out questions now and then, and a checkpoint with it."""
        if not self.looks:
            self._look()
        while self.step < self.plan.steps and not self._settled():
            self.losses.append(self._train_step())
            self.step += 1
            if progress is not None:
                progress(self.step, self.plan.steps, self.losses[-1])
            if self.step % self.plan.look_every == 0 or self.step == self.plan.steps:
                self._look()
        if progress is not None:
            progress(self.plan.steps, self.plan.steps, self.losses[-1] if self.losses else 0.0)

    def _drawn(self, step: int) -> tuple[list[int], int]:
        """Which questions a step trains on, and its seed: by its number, so that a resumed run goes on as it would."""
        draw = random.Random(f"{self.plan.seed} {step}")
        chosen = draw.sample(range(len(self.train_on)), min(self.plan.batch, len(self.train_on)))
        return chosen, draw.randrange(2**31)

    def _train_step(self) -> float:
        self.learner.train()
        chosen, seed = self._drawn(self.step)
        loss = self.lesson.loss([self.prepared[each] for each in chosen], torch.Generator().manual_seed(seed))
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return float(loss.detach())

    def _look(self) -> None:
        """The loss on the held-out questions, with the same chance every time; the best weights so far are kept."""
        self.learner.eval()
        losses = []
        with torch.no_grad():
            for start in range(0, len(self.looked_at), self.plan.batch):
                batch = self.looked_at[start : start + self.plan.batch]
                loss = self.lesson.loss(batch, torch.Generator().manual_seed(start))
                losses += [float(loss)] * len(batch)
        mean = sum(losses) / len(losses)
        if mean < min((each for _, each in self.looks), default=float("inf")):
            self.best = {name: value.detach().clone() for name, value in self.learner.state_dict().items()}
        self.looks.append((self.step, mean))
        self._checkpoint()

    def _settled(self) -> bool:
        """Whether the last looks brought nothing new."""
        losses = [loss for _, loss in self.looks]
        return len(losses) > self.plan.patience and min(losses[-self.plan.patience :]) > min(losses)

    def _checkpoint(self) -> None:
        state = {
            "step": self.step,
            "losses": self.losses,
            "looks": self.looks,
            "learner": self.learner.state_dict(),
            "best": self.best,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with whole_file(self.folder / "checkpoint.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Go on where an earlier call has stopped; refuse a folder of another fit."""
        head, saved = self.folder / "fit.json", self.folder / "checkpoint.pt"
        known = _read(head, lambda: {**json.loads(head.read_text())}) if head.exists() else self.about
        if known != self.about:
            differ = ", ".join(key for key, value in self.about.items() if known.get(key) != value)
            raise InputError(f"{self.folder} holds another fit ({differ} differs): choose another folder, or empty it")
        if not head.exists():
            with whole_file(head) as file:
                file.write((json.dumps(self.about, indent=1) + "\n").encode())
        if saved.exists():
            _read(saved, lambda: self._take(torch.load(saved, map_location="cpu", weights_only=True)))

    def _take(self, state: dict[str, Any]) -> None:
        """What `_checkpoint` wrote."""
        self.step, self.losses, self.looks = state["step"], state["losses"], [tuple(look) for look in state["looks"]]
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = state["best"]

    def write(self) -> Fitted:
        """Weights, the recipe that names them, and the log."""
        self.learner.load_state_dict(self.best)
        written, paths = self.lesson.write(self.folder)
        with whole_file(self.folder / "log.json") as file:
            log = {"plan": self.plan.to_dict(), "losses": self.losses, "looks": self.looks, "best": self._best_step()}
            file.write((json.dumps(log) + "\n").encode())
        return Fitted(written, paths, tuple(self.losses), tuple(self.looks), self._best_step())

    def _best_step(self) -> int:
        return min(self.looks, key=lambda look: look[1])[0]


def _read(file: Path, read: Callable[[], Any]) -> Any:
    """What an earlier call has left.

    Raises:
        InputError: something else has written there since.
    """
    try:
        return read()
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError):
        # Not torch's own words: they advise to open the file without care.
        raise InputError(f"{file} is not what a fit leaves: choose another folder, or empty it") from None


def _split(data: Sequence[Asked], plan: Plan) -> tuple[list[Asked], list[Asked]]:
    """What is trained on, and what is held out: different pictures where the data says which is which."""
    groups: dict[Any, list[Asked]] = {}
    for number, asked in enumerate(data):
        groups.setdefault(getattr(asked, "picture_id", number), []).append(asked)
    order = list(groups.values())
    random.Random(plan.seed).shuffle(order)
    count = max(1, round(plan.held_out * len(order)))
    if len(order) < 2:
        boxes = " (with --aim boxes, questions that have no box are left out)" if plan.aim == "boxes" else ""
        told = f"expected at least 2 pictures, to learn from and to hold some out, got {len(order)}"
        raise InputError(f"data: {told}{boxes}")
    flat = [[asked for group in part for asked in group] for part in (order[count:], order[:count])]
    return flat[0], flat[1][: 8 * plan.batch]


def _digest(data: Sequence[Asked], plan: Plan) -> str:
    """Of what is asked about what, and of boxes where they are learned from."""
    lines = [f"{getattr(asked, 'picture_id', '')} {asked.question}" for asked in data]
    if plan.aim == "boxes":
        lines += [str(box_of(asked)) for asked in data]
    text = "\n".join(lines)
    return sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model gets a gradient within the block; all are as before behind it."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        model.train(mode)
