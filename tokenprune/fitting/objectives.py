"""What a fit minimises: how far learned parts are from what the untouched model does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.gates import batch_threshold
from tokenprune.core.report import Report
from tokenprune.core.tokens import Tokens
from tokenprune.engine.attach import attach
from tokenprune.errors import InputError
from tokenprune.families.anatomy import anatomy
from tokenprune.families.chat import Chat, end_tokens
from tokenprune.fitting.plan import Plan
from tokenprune.fitting.soft import Probe, SoftStage, in_training
from tokenprune.parts.learned import Learned
from tokenprune.parts.raters.text import LastTextRaters
from tokenprune.parts.schedulers.fixed import SolvedScheduler
from tokenprune.parts.schedulers.threshold import ThresholdScheduler
from tokenprune.parts.scorers.attention import AttentionScorer
from tokenprune.pipeline import Pipeline
from tokenprune.stage import Stage
from tokenprune.study.cases import Box


class Prompts(NamedTuple):
    """One picture and one question of each sample."""

    pictures: list[Any]
    questions: list[str]
    boxes: Sequence[Box | None] = ()
    """Where the thing asked for is; only the aim ``boxes`` reads them."""


class Objective(Protocol):
    """A loss over a batch of prompts."""

    def loss(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        """A number with a gradient to the learned parts; what chance decides, `generator` decides."""
        ...


class AttentionObjective:
    """Scores of the learned stages learn where the last text token looks, averaged over layers and heads.

    ``KL(attention over the vision tokens ‖ softmax of the scores)``. The model runs forward only and once for a batch,
    and averaging over layers takes the noise out of single heads: the scores may end up better than any of them.

    Raises:
        InputError: a learned part that is no scorer: attention tells nothing about it.
    """

    def __init__(self, chat: Chat, stages: Sequence[Stage], plan: Plan) -> None:
        self._chat = chat
        self._stages = scoring(stages, "attention")
        depth = len(anatomy(chat.model).layers)
        low, high = (max(1, min(depth - 1, round(share * depth))) for share in plan.layers)
        self._layers = range(low, high + 1)

    def loss(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        seen: list[tuple[Stage, Tokens, Tensor | None]] = []
        looks: list[tuple[Tensor, Tokens]] = []
        probes: list[Stage] = [
            Probe(stage, lambda tokens, weights, stage=stage: seen.append((stage, tokens, weights)))  # type: ignore[misc]
            for stage in self._stages
        ]
        for layer in self._layers:
            listener = Stage(
                place=layer, raters=LastTextRaters(), scorer=AttentionScorer(normalise="vision"), name=f"layer {layer}"
            )
            probes.append(
                Probe(
                    listener,
                    lambda tokens, weights, own=listener: looks.append((own.scorer(tokens, weights), tokens)),  # type: ignore[misc]
                )
            )
        run_probes(self._chat, probes, prompts)
        valid = looks[0][1].valid
        attention = torch.stack([look.masked_fill(~valid, 0.0) for look, _ in looks]).mean(0)
        teacher = attention / attention.sum(1, keepdim=True).clamp(min=1e-12)
        losses = []
        for stage, tokens, weights in seen:
            scores = stage.scorer(tokens, weights)
            student = scores.log_softmax(1).masked_fill(~tokens.valid, 0.0)
            losses.append(functional.kl_div(student, teacher, reduction="batchmean"))
            if isinstance(stage.scheduler, ThresholdScheduler):  # a softmax knows no bar
                bar = stage.scheduler
                losses[-1] = losses[-1] + (batch_threshold(scores, bar.expected) - bar.above).square()
        return torch.stack(losses).mean()


class LogitsObjective:
    """The model's predictions with gates learn to be those of the untouched model, on its own answer.

    ``KL(untouched ‖ reduced)`` at every token of the answer that the untouched model gives. Each step draws a budget,
    log-uniformly, so that one set of weights serves many. Stages with a threshold have a budget of their own: what
    scores are off the bar is added. Stages whose scorer does not learn drop tokens as ever.
    """

    def __init__(self, chat: Chat, stages: Sequence[Stage], plan: Plan) -> None:
        self._chat, self._plan = chat, plan
        self._depth = len(anatomy(chat.model).layers)
        self._share = 1.0
        self._generator = torch.Generator()
        self._stages = [
            SoftStage(stage, lambda size: round(self._share * size), self._generator)
            if isinstance(stage.scorer, Learned)
            else in_training(stage)
            for stage in stages
        ]

    def loss(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        low, high = (math.log(max(share, 1e-3)) for share in self._plan.keep)
        self._share = math.exp(low + (high - low) * torch.rand((), generator=generator).item())
        self._generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        inputs = self._chat.batch([[picture] for picture in prompts[0]], prompts[1])
        length = inputs["input_ids"].shape[1]
        inputs, told = self._with_answers(inputs)
        rows = slice(-told.shape[1] - 1, -1)  # from the end: where tokens go, logits go
        with torch.no_grad():
            teacher = self._chat.model(**inputs).logits[:, rows].float().log_softmax(-1)
        stages = [
            in_training(stage, self._share) if isinstance(stage.scheduler, SolvedScheduler) else stage
            for stage in self._stages
        ]
        with attach(self._chat.model, Pipeline(stages, depth=self._depth, name="fit")) as attached:
            attached.engine.now.limit = length  # answers are no part of the question
            student = self._chat.model(**inputs).logits[:, rows].float().log_softmax(-1)
        apart = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        off = [stage.off for stage in self._stages if isinstance(stage, SoftStage) and stage.off is not None]
        return (apart * told).sum() / told.sum() + sum(off, torch.zeros((), device=apart.device))

    def _with_answers(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The prompts with the untouched model's answers, and ``[B, A]`` 1.0 where an answer has a token."""
        answers = self._chat.generate(inputs, self._plan.answer_tokens)
        ends = torch.tensor(end_tokens(self._chat.model)[0], device=answers.device)
        over = torch.isin(answers, ends).cumsum(1)
        told = (over - torch.isin(answers, ends).long()) == 0  # the first end token is still said
        batch, length = inputs["input_ids"].shape
        longer = dict(inputs)
        for name, value in inputs.items():
            if value.dim() == 2 and value.shape == (batch, length):
                more = answers if name == "input_ids" else told.to(value.dtype) if name == "attention_mask" else None
                longer[name] = torch.cat(
                    [value, torch.zeros_like(answers).to(value.dtype) if more is None else more], 1
                )
        return longer, told.float()


def scoring(stages: Sequence[Stage], aim: str) -> list[Stage]:
    """The stages that learn, where an aim teaches scores.

    Raises:
        InputError: a learned part that is no scorer.
    """
    learning = [stage for stage in stages if any(isinstance(part, Learned) for part in stage.parts)]
    for stage in learning:
        for part in stage.parts:
            if isinstance(part, Learned) and part.role != "scorer":
                raise InputError(f"{part.title} does not score, so {aim} cannot teach it; fit with --aim logits")
    return learning


def run_probes(chat: Chat, probes: Sequence[Stage], prompts: Prompts) -> Report:
    """Run the model forward once, without gradients, with `probes` at their places; the report of that."""
    depth = len(anatomy(chat.model).layers)
    ordered = sorted(probes, key=lambda stage: stage.place.layer(depth))
    with torch.no_grad(), attach(chat.model, Pipeline(ordered, depth=depth, name="fit")) as attached:
        chat.model(**chat.batch([[picture] for picture in prompts[0]], prompts[1]))
    return attached.report
