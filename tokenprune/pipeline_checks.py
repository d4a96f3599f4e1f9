"""What stages must have in common to be one pipeline, and what they must have gone through to be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from tokenprune.apart import Alone, Pictures
from tokenprune.budget import Budget, Step, survivors
from tokenprune.core.tokens import Tokens
from tokenprune.errors import BudgetError, InputError, RecipeError, did_you_mean
from tokenprune.stage import Stage


def check_inside(name: str, stages: Sequence[Stage], budget: Budget | None) -> None:
    """Raise `BudgetError` where stages inside the vision tower cannot know what the budget asks of a picture.

    Args:
        name: of the pipeline, for the message.
        stages: all of it.
        budget: for all stages together; None leaves the counts to the schedulers.
    """
    kinds = {stage.place.kind for stage in stages}
    if budget is None or "in_vision" not in kinds:
        return
    if len(kinds) > 1:
        told = "some stages act inside the vision tower, picture by picture, others behind it, sample by sample"
        told += "; leave the budget out, and let their schedulers say how many to keep"
    elif budget.kind == "flops":
        told = (
            "what a prompt costs is not known while the vision tower runs on its pictures, where the stages act; "
            f"expected keep, such as keep: 0.25 (tokenprune flops {name} --keep 0.25 tells what it costs)"
        )
    else:
        return
    raise BudgetError(f"{name}: budget {budget}: {told}")


def check_apart(name: str, stages: Sequence[Stage], pictures: Pictures, *, counted: bool) -> None:
    """Raise `RecipeError` where pictures are taken apart and a stage needs the others, or the whole prompt, to be run.

    Args:
        name: of the pipeline, for the message.
        stages: all of it.
        pictures: ``together`` or ``apart``.
        counted: whether the shape of a picture tells how many of its tokens each stage keeps.
    """
    if pictures not in get_args(Pictures):
        hint = did_you_mean(pictures, get_args(Pictures))
        raise RecipeError(f"{name}: pictures: expected together or apart, got {pictures!r}{hint}")
    if pictures == "together" or not stages:
        return
    for stage in stages:
        told = f"{name}: pictures: apart: {stage.name} ({stage.place})"
        if stage.place.kind != "after_vision":
            raise RecipeError(f"{told}: pictures can be taken apart after_vision alone")
        if stage.reads.attention:
            raise RecipeError(f"{told}: attention is of the whole prompt, and reads all pictures at once")
        if stage.rectifier is not None:
            raise RecipeError(f"{told}: a rectifier acts on the whole prompt; leave it out, or pictures: together")
    if not counted:
        raise RecipeError(
            f"{name}: pictures: apart: how many tokens each picture keeps must be known from its shape; give "
            "a budget keep, or a scheduler of fixed counts"
        )


def check_skipping(name: str, stages: Sequence[Stage], pictures: Pictures) -> None:
    """Raise `RecipeError` where a stage follows one whose dropped tokens stay in the sequence (``dropped: skip_ffn``).

    Args:
        name: of the pipeline, for the message.
        stages: all of it.
        pictures: ``together`` or ``apart``.
    """
    for number, stage in enumerate(stages):
        told = f"{name}: {stage.name} ({stage.place}): dropped: skip_ffn"
        if stage.skips and number < len(stages) - 1:
            later = stages[number + 1]
            raise RecipeError(
                f"{told}: what is dropped stays in the sequence, so no stage may follow, and {later.name} "
                f"({later.place}) does; put it last"
            )
        if stage.skips and pictures == "apart":
            raise RecipeError(f"{told}: pictures are taken together here; leave out pictures: apart")


def check_sizes(
    where: str,
    before: Sequence[Step],
    tokens: Tokens,
    plans: Sequence[Sequence[int | None]],
    pictures: Sequence[Alone] = (),
) -> None:
    """Raise `InputError` where tokens have not been through the stages before, as far as the plan can tell.

    Args:
        where: the stage to be run, for the message.
        before: the stages that come before it.
        tokens: that are to go into it.
        plans: of each sample, how many tokens each stage keeps.
        pictures: of all samples as they come to the stage, where each is reduced by itself.
    """
    for row, (size, total, counts) in enumerate(zip(tokens.sizes, tokens.total, plans, strict=True)):
        kept = [count for count in counts[: len(before)] if count is not None]
        if len(kept) < len(before):
            continue
        expected = survivors(before, kept, total)[-1] if before else total
        if pictures:
            expected = sum(picture.size for picture in pictures if picture.row == row)
        if size != expected:
            raise InputError(
                f"{where} expects {expected} vision tokens of sample {row}, got {size}; "
                f"run the places in order, each on what the one before returned"
            )
