"""GlimpsePrune+ (arXiv:2508.01548): the language model learns by rewards to answer from a pruned picture.

    pip install -e '.[wrapped]'
    python benchmarks/learned/plus.py

The predictor of `glimpseprune` is fitted to the embedded model; PEFT puts low-rank adapters (LoRA) on the language
model, which learn while the recipe is attached, by rewards of groups of sampled answers (GRPO, with a penalty on
leaving the untouched model); they are merged into the weights, and the predictor is fitted again. That is fine-tuning
of the model itself: nothing in the package does it, and nothing asks for it.

The paper answers from pictures pruned by true masks, and a language model judges; here the recipe prunes, and an answer
is right or wrong, as scenes know. Held-out questions are asked under every combination, also with all tokens; what
adapters bring there they bring by training, not by pruning. Writes `plus.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.progress import track
from torch import Tensor

import tokenprune as tp
from tokenprune.core.files import whole_file
from tokenprune.families.chat import Chat, end_tokens
from tokenprune.fitting import Plan, fit
from tokenprune.fitting.rewards import group_advantages
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.scenes import load_embedded
from tokenprune.scenes.cases import scene_cases, training_cases
from tokenprune.study.cases import Case
from tokenprune.study.evaluate import difference
from tokenprune.study.statistics import accuracy

LAYERS = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PENALTY = 0.04
"""Weight of the distance from the untouched model, as the paper has it."""


def adapted(model: Any, rank: int) -> Any:
    """The model with adapters on its language model, which alone have gradients; they change nothing yet."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS)
    return peft.get_peft_model(model, config).eval()


class Group:
    """Sampled answers of some questions, each asked several times under a recipe.

    Args:
        chat: whose model has adapters.
        recipe: attached while it answers and while it learns.
        cases: the questions.
        rollouts: of each.
        seed: of the samples.
    """

    def __init__(self, chat: Chat, recipe: Recipe, cases: Sequence[Case], rollouts: int, seed: int) -> None:
        self._chat, self._recipe, self._shape = chat, recipe, (len(cases), rollouts)
        repeated = [case for case in cases for _ in range(rollouts)]
        inputs = chat.batch([[case.picture()] for case in repeated], [case.question for case in repeated])
        self._length = inputs["input_ids"].shape[1]
        with torch.random.fork_rng(), torch.no_grad(), tp.attach(chat.model, recipe):
            torch.manual_seed(seed)
            pad = end_tokens(chat.model)[1]
            ids = chat.model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=0, pad_token_id=pad)
        self.answers: Tensor = ids[:, self._length :]
        right = [case.right(chat.text(row)) for case, row in zip(repeated, self.answers, strict=True)]
        self.rewards = torch.tensor(right, dtype=torch.float32).reshape(self._shape)
        over = torch.isin(self.answers, torch.tensor(end_tokens(chat.model)[0])).int()
        self.said = (over.cumsum(1) - over) == 0  # the first end token is still said
        self._inputs = dict(inputs)
        for name, more in (("input_ids", self.answers), ("attention_mask", self.said.long())):
            self._inputs[name] = torch.cat([inputs[name], more], 1)

    def log_probabilities(self) -> Tensor:
        """``[G·n, A]`` of every token of the answers, under the recipe."""
        with tp.attach(self._chat.model, self._recipe) as attached:
            attached.engine.now.limit = self._length  # answers are no part of the question
            logits = self._chat.model(**self._inputs).logits
        rows = logits[:, -self.answers.shape[1] - 1 : -1].float().log_softmax(-1)
        return rows.gather(2, self.answers[:, :, None]).squeeze(2)

    def loss(self) -> Tensor:
        """Of one step on samples just drawn, so that no ratio of policies needs clipping."""
        with torch.no_grad(), self._chat.model.disable_adapter():
            before = self.log_probabilities()
        now = self.log_probabilities()
        gain = group_advantages(self.rewards).reshape(-1, 1) * torch.exp(now - now.detach())
        away = torch.exp(before - now) - (before - now) - 1  # of low variance, and never below 0
        return ((PENALTY * away - gain) * self.said).sum() / self.said.sum()


def adapt(chat: Chat, recipe: Recipe, cases: Sequence[Case], options: argparse.Namespace) -> list[float]:
    """Teach the adapters of `chat.model`, and tell the mean reward of every step."""
    weights = [parameter for parameter in chat.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.0)
    rewards = []
    for step in track(range(options.steps), "adapting"):
        chosen = random.Random(f"{options.seed} {step}").sample(list(cases), options.batch)
        group = Group(chat, recipe, chosen, options.rollouts, seed=step)
        optimiser.zero_grad()
        group.loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        rewards.append(group.rewards.mean().item())
    return rewards


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--place", default="1/4", help="share of the depth; the recipe's own place costs no answers here")
    made.add_argument("--final", type=float, default=0.1, help="share of the tokens behind it, for all questions")
    for name, default in (("steps", 60), ("batch", 8), ("rollouts", 4), ("rank", 32), ("scenes", 30), ("seed", 0)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--rate", type=float, default=1e-4)
    made.add_argument("--fit", type=int, default=80, help="steps of both fits of the predictor")
    made.add_argument("--runs", type=Path, default=Path("runs/plus"))
    made.add_argument("--out", type=Path, default=Path(__file__).with_name("plus.json"))
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    # In training an answer comes in one forward with its prompt, which leaves caches nothing to lose.
    sets = [f"stages.0.place={{before_layer: {options.place}}}", "stages.0.scheduler={type: solved}"]
    bare = load_recipe("glimpseprune", final=options.final, sets=[*sets, "stages.0.kv=later_layers"])
    cases, lessons = scene_cases(options.scenes), training_cases(300)
    plan = Plan(aim="logits", steps=options.fit, batch=8, keep=(0.05, 0.3), held_out=0.01, patience=20)
    (model, processor), (other, _) = load_embedded(), load_embedded()
    recipe = load_recipe(fit(model, processor, bare, lessons, options.runs / "model", plan=plan).recipe)
    chat = Chat("adapted", adapted(other, options.rank), processor)
    rewards = adapt(chat, recipe, lessons, options)
    chat = Chat("adapted", chat.model.merge_and_unload(), processor)
    refitted = load_recipe(fit(*chat, bare, lessons, options.runs / "adapted", plan=plan).recipe)
    asked: dict[str, tuple[Any, Recipe]] = {
        "model, all tokens": (model, load_recipe("none")),
        "model": (model, recipe),
        "adapted, all tokens": (chat.model, load_recipe("none")),
        "adapted": (chat.model, recipe),
        "adapted, predictor fitted again": (chat.model, refitted),
    }
    right = {name: answered(processor, cases, *each) for name, each in asked.items()}
    write(options, rewards, cases, right)


def answered(processor: Any, cases: Sequence[Case], model: Any, recipe: Recipe) -> Any:
    """1.0 for each question that is answered right."""
    return np.array(
        [case.right(tp.ask(model, processor, case.picture(), case.question, recipe).text) for case in cases], float
    )


def write(options: argparse.Namespace, rewards: list[float], cases: Sequence[Case], right: dict[str, Any]) -> None:
    pictures = [case.picture_id for case in cases]

    def compare(name: str, other: str) -> dict[str, float | None]:
        return difference(right[name], right[other], pictures).to_dict()

    told = {
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "questions": len(cases),
        "rewards": [round(each, 3) for each in rewards],
        "right": {name: accuracy(each, pictures).to_dict() for name, each in right.items()},
        "more_than_model": {name: compare(name, "model") for name in ("adapted", "adapted, predictor fitted again")},
        "all_tokens": compare("adapted, all tokens", "model, all tokens"),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    with whole_file(options.out) as file:
        file.write((json.dumps(told, indent=1) + "\n").encode())
    print(json.dumps({name: told[name] for name in ("right", "more_than_model", "all_tokens")}, indent=1))


if __name__ == "__main__":
    main()
