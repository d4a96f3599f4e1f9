"""Parts that break their promise are named, in a plain pipeline and on an attached model alike; nothing is silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, inputs
from pruned import TOLERANCE, logits_of, reference_stages, stage_results
from reference import pruned_difference, reference_logits, vision_mask
from torch import Tensor

import tokenprune as tp
from tokenprune.core.groups import Groups
from tokenprune.core.merge import Merge, merge
from tokenprune.core.needs import Needs
from tokenprune.core.place import Place
from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.groupers.base import Grouper
from tokenprune.parts.raters.text import LastTextRaters
from tokenprune.parts.rectifiers.base import Rectifier
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.base import Scheduler
from tokenprune.parts.schedulers.fixed import FixedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import RasterScorer
from tokenprune.stage import Stage


def stage(**parts: Any) -> Stage:
    """Before layer 2, half of the tokens, by their place."""
    plain = {"scheduler": FixedScheduler(keep=0.5), "scorer": RasterScorer(), "sampler": TopKSampler()}
    return Stage(place=Place("before_layer", 2), name="mine", **{**plain, "recycler": DropRecycler(), **parts})


class ForeignSampler(Sampler):
    def __init__(self, change: Any = lambda kept: kept) -> None:
        super().__init__()
        self.change = change

    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, tokens: Tokens, scores: Tensor, count: Any) -> Tensor:
        return self.change(TopKSampler()(tokens, scores, count))


class ForeignScorer(Scorer):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
        return self.change(tokens)


class ForeignScheduler(Scheduler):
    def nominal(self, size: int, *, total: int, grids: Any) -> float:
        return 1.0

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> Tensor:
        return torch.full((scores.shape[0],), scores.shape[1] + 1)


class ForeignRecycler(Recycler):
    """Promises one anchor, plans two."""

    def added(self, dropped: int) -> int:
        return min(1, dropped)

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Any) -> Merge | None:
        batch = scores.shape[0]
        two = torch.arange(2).expand(batch, -1)
        return Merge(source=two, target=two, weight=torch.eye(2).expand(batch, -1, -1), anchors=(2,) * batch)


class LyingRecycler(Recycler):
    """Tokens 0 and 15 flow into survivor 15, but for what `change` says; the stage keeps tokens 8 … 15 of 16."""

    def __init__(self, **change: Any) -> None:
        super().__init__()
        self.change = change

    def settings(self) -> dict[str, Any]:
        return {}

    def added(self, dropped: int) -> int:
        return self.change.get("anchors", (0,))[0]

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Any) -> Merge | None:
        plan = {"source": [[0, 15]], "target": [[15]], "weight": [[[1.0, 1.0]]], "anchors": (0,)} | self.change
        return Merge(**{key: torch.tensor(x) if isinstance(x, list) else x for key, x in plan.items()})


LIES = {
    "a dropped token as survivor": {"target": [[3]]},
    "an anchor that survives": {"target": [[12]], "anchors": (1,)},
    "a survivor twice": {"target": [[12, 12]], "weight": [[[1.0, 1.0]] * 2]},
    "an anchor twice": {"target": [[3, 3]], "weight": [[[1.0, 1.0]] * 2], "anchors": (2,)},
    "anchors out of order": {"target": [[6, 3]], "weight": [[[1.0, 1.0]] * 2], "anchors": (2,)},
    "a target below -1": {"target": [[-2]]},
    "a weight on padding": {"source": [[0, -1]]},
    "an infinite weight": {"weight": [[[1.0, float("inf")]]]},
    "a negative share": {"share": [[[1.0, -1.0]]]},
    "a NaN share": {"share": [[[1.0, float("nan")]]]},
    "soft weights called hard": {"weight": [[[0.5, 0.5]]], "hard": True},
    "no weight": {"weight": [[[0.0, 0.0]]]},
}


def lied(**change: Any) -> None:
    tokens = Tokens.from_hidden(torch.randn(1, 16, 4), grid=(4, 4))
    stage(recycler=LyingRecycler(**change))(tokens)


@pytest.mark.parametrize("lie", LIES)
def test_a_plan_that_lies_is_refused_by_name(lie: str) -> None:
    lied()  # the plan as it stands is fine
    with pytest.raises(InputError, match=r"mine \(before_layer: 2\): recycler 'lying' "):
        lied(**LIES[lie])


class ForeignRectifier(Rectifier):
    def forward(self, tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.mass, torch.inf)


BROKEN = {
    "too few": (
        {"sampler": ForeignSampler(lambda kept: kept[:, 1:])},
        r"mine \(before_layer: 2\): sampler 'foreign' gave indices .* expected \(\d, \d+\) of int64",
    ),
    "half numbers": ({"sampler": ForeignSampler(lambda kept: kept.float())}, "gave indices .* of float32"),
    "twice": (
        {"sampler": ForeignSampler(torch.zeros_like)},
        "sampler 'foreign' gave indices out of range, out of order",
    ),
    "order": ({"sampler": ForeignSampler(lambda kept: kept.flip(1))}, "out of order or twice"),
    "range": ({"sampler": ForeignSampler(lambda kept: kept + 1000)}, "out of range"),
    "negative": ({"sampler": ForeignSampler(lambda kept: kept - 1000)}, "out of range"),
    "scores": (
        {"scorer": ForeignScorer(lambda tokens: tokens.mass[:, 1:])},
        r"scorer 'foreign' gave scores .* expected \(\d, \d+\) of float32",
    ),
    "half scores": ({"scorer": ForeignScorer(lambda tokens: tokens.mass.half())}, "scores .* of float16"),
    "nan": ({"scorer": ForeignScorer(lambda tokens: tokens.mass * torch.nan)}, "scorer 'foreign' gave NaN scores; are"),
    "counts": ({"scheduler": ForeignScheduler()}, r"scheduler 'foreign' keeps \[\d+.*\] tokens; expected one count"),
    "anchors": ({"recycler": ForeignRecycler()}, r"recycler 'foreign' made \[2.*\] merged tokens; expected \[1"),
    "bias": ({"rectifier": ForeignRectifier()}, "rectifier 'foreign' gave biases that are not finite"),
    "question": (
        {"scorer": ForeignScorer(lambda tokens: tokens.question.embeddings.sum() + tokens.mass)},
        r"scorer 'foreign' reads the question, but does not declare it; .*Needs\(question=True\)",
    ),
    "embedding": (
        {"scorer": ForeignScorer(lambda tokens: tokens.signal("embedding").norm(dim=-1))},
        "scorer 'foreign' reads the signal 'embedding', but declares none",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_promise_names_the_part_in_a_pipeline_and_attached(case: str) -> None:
    parts, message = BROKEN[case]
    tokens = Tokens.from_hidden(torch.randn(2, 16, 8), text=torch.randn(2, 3, 8))
    with pytest.raises(InputError, match=message):
        tp.Pipeline([stage(**parts)], depth=8)[2](tokens)
    model = build("llava")
    with tp.attach(model, tp.Pipeline([stage(**parts)])), pytest.raises(InputError, match=message):
        model(**inputs("llava", model))


class FoldInRecycler(Recycler):
    """Adds the mean of all dropped tokens to every survivor: nothing is an anchor, every survivor changes."""

    def added(self, dropped: int) -> int:
        return 0

    def forward(self, tokens: Tokens, kept: Tensor, scores: Tensor, count: Any) -> Merge | None:
        counts = tokens.counts(count)
        gone = tokens.valid.scatter(1, kept.clamp(min=0), kept < 0) if tokens.padded else tokens.valid.clone()
        if not tokens.padded:
            gone = gone.scatter(1, kept, False)
        n = tokens.valid.shape[1]
        every = torch.arange(n).expand(len(counts), -1)
        weight = gone.float().unsqueeze(1) / gone.sum(1).clamp(min=1)[:, None, None]
        own = (kept.unsqueeze(2) == every.unsqueeze(1)).float()
        weight = (weight + own) * (kept >= 0).unsqueeze(2)
        share = own + gone.float().unsqueeze(1) / torch.tensor(counts)[:, None, None] * (kept >= 0).unsqueeze(2)
        return Merge(source=every, target=kept, weight=weight, anchors=(0,) * len(counts), mean=False, share=share)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_recycler_that_changes_survivors_moves_the_logits(family: str, attention: Any) -> None:
    """As it moves the tokens of the plain pipeline, and as the masked reference says; `drop` gives other logits."""
    model = build(family, attention=attention)
    batch = inputs(family, model)
    made = stage(recycler=FoldInRecycler())
    with tp.attach(model, tp.Pipeline([made])) as attached, stage_results(attached) as results:
        logits = logits_of(model, batch)
    stages = reference_stages(attached.report, results)
    assert stages[0].anchors is not None and torch.equal(stages[0].anchors, stages[0].kept)
    assert results[0].tokens.mass.sum(1).tolist() == pytest.approx(list(attached.report.total))
    expected = reference_logits(model, batch, stages)
    vision, real = vision_mask(model, batch["input_ids"]), batch["attention_mask"]
    kept = attached.report.stages[0].kept
    assert pruned_difference(logits, expected, vision, real, kept) < TOLERANCE
    with tp.attach(model, tp.Pipeline([stage()])) as attached:
        assert not torch.allclose(logits_of(model, batch), logits, atol=1e-2)


def test_a_plain_pipeline_writes_what_the_plan_says() -> None:
    tokens = Tokens.from_hidden(torch.randn(2, 16, 8), text=torch.randn(2, 3, 8))
    result = tp.Pipeline([stage(recycler=FoldInRecycler())], depth=8).run(2, tokens)[-1]
    dropped = tokens.hidden[:, :8].mean(1, keepdim=True)  # raster keeps the last half
    assert torch.allclose(result.tokens.hidden, tokens.hidden[:, 8:] + dropped, atol=1e-5)
    assert result.written is not None and result.written.tolist() == [list(range(8))] * 2
    assert torch.equal(result.tokens.mass, torch.full((2, 8), 2.0))


class OddRecycler(FoldInRecycler):
    """Its states are no sums: a part may compute others."""

    def states(self, tokens: Tokens, plan: Merge) -> Tensor:
        return merge(tokens.hidden, plan).tanh()


def test_a_recycler_may_compute_states_of_its_own() -> None:
    tokens = Tokens.from_hidden(torch.randn(2, 16, 8))
    one, other = (
        tp.Pipeline([stage(recycler=r)], depth=8).run(2, tokens)[-1] for r in (FoldInRecycler(), OddRecycler())
    )
    assert torch.allclose(one.tokens.hidden.tanh(), other.tokens.hidden)


def test_declarations_are_checked_when_they_are_made() -> None:
    with pytest.raises(RecipeError, match=r"Needs\(attention='last'\); expected one of: previous, next"):
        Needs(attention="last")
    with pytest.raises(RecipeError, match=r"Needs\(tower='class_atention'\) \(did you mean 'class_attention'\?\)"):
        Needs(tower="class_atention")
    with pytest.raises(RecipeError, match="expected numbers of layers, at least 1"):
        Needs(earlier=0)


def test_raters_are_checked_too() -> None:
    class ForeignRaters(LastTextRaters):
        def forward(self, tokens: Tokens) -> Tensor:
            return super().forward(tokens)[:, 1:]

    made = stage(raters=ForeignRaters())
    tokens = Tokens.from_hidden(torch.randn(2, 16, 8), text=torch.randn(2, 3, 8))
    with pytest.raises(InputError, match=r"raters 'foreign' gave weights \(2, 2\) of float32; expected \(2, 3\)"):
        tp.Pipeline([made], depth=8)[2](tokens)


class Returns(Scheduler):
    """Keeps what it was told to, however odd."""

    suffix = "Returns"

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def settings(self) -> dict[str, Any]:
        return {}

    def nominal(self, size: int, *, total: int, grids: Any) -> float:
        return 1.0

    def forward(self, tokens: Tokens, scores: Tensor, raters: Tensor | None = None) -> Any:
        return self.given


class ReturnsStatic(Returns):
    static = True


class ForeignGrouper(Grouper):
    def __init__(self, index: Tensor, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.index, self.grid = index, grid

    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, tokens: Tokens) -> Groups:
        return Groups(self.index.expand(1, 16), ((8, 8),), ((self.grid, self.grid),))


ONE = Tokens.from_hidden(torch.randn(1, 16, 4), grid=(4, 4))
HALVES = torch.arange(16) // 8
ODD = {
    "no scores": ({"scorer": ForeignScorer(lambda tokens: None)}, "scorer 'foreign' gave NoneType for scores"),
    "half a token": ({"scheduler": Returns(torch.tensor([3.5]))}, "gave counts .* of float32"),
    "a yes": ({"scheduler": Returns(torch.tensor([True]))}, "gave counts .* of bool"),
    "a list": ({"scheduler": Returns([3])}, "gave list for counts"),
    "one count for all": ({"scheduler": Returns(torch.tensor(3))}, r"gave counts \(\) of int64; expected \(1,\)"),
    "static: half a token": ({"scheduler": ReturnsStatic((3.5,))}, r"keeps \(3.5,\) tokens; expected an int a sample"),
    "static: a yes": ({"scheduler": ReturnsStatic((True,))}, "expected an int a sample"),
    "static: too many": ({"scheduler": ReturnsStatic((99,))}, r"keeps \[99\] tokens; expected one count a sample"),
    "a group too large": ({"grouper": ForeignGrouper(HALVES * 0, (1, 2, 4))}, "an index that does not fit its sizes"),
    "groups that are not there": ({"grouper": ForeignGrouper(HALVES + 99, (1, 2, 4))}, "does not fit its sizes"),
    "a grid too small": ({"grouper": ForeignGrouper(HALVES, (1, 2, 2))}, r"a group of 8 tokens the grid \(1, 2, 2\)"),
    "changed": (
        {"scorer": ForeignScorer(lambda tokens: tokens.mass.mul_(1.0))},
        "`tokens.mass` was changed in place by one of: scorer 'foreign'",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_a_part_returns_and_leaves_is_checked_before_use(case: str) -> None:
    parts, told = ODD[case]
    stage(grouper=ForeignGrouper(HALVES, (1, 2, 4)))(ONE)  # groups as they should be
    with pytest.raises(InputError, match=r"mine \(before_layer: 2\): .*" + told):
        stage(**parts)(ONE)


UNDECLARED = {
    "recorded": lambda t: t.signals.recorded["keys"].value.norm(dim=-1),
    "question as a truth": lambda t: t.hidden.norm(dim=-1) if t.question else None,
    "length of the question": lambda t: t.hidden.norm(dim=-1) * len(t.question),
    "attention where there is none": lambda t: t.attention.scores(None),
}


@pytest.mark.parametrize("how", UNDECLARED)
def test_undeclared_reads_do_not_get_through(how: str) -> None:
    tokens = Tokens.from_hidden(torch.randn(1, 16, 4), signals={"keys": torch.randn(1, 16, 4)})
    told = "reads the signal 'keys', but declares none; state it in" if how == "recorded" else "does not declare it"
    with pytest.raises(InputError, match=told):
        stage(scorer=ForeignScorer(UNDECLARED[how]))(tokens)


def test_a_declared_signal_that_nothing_has_recorded_is_told() -> None:
    seen = Tokens.from_hidden(torch.randn(1, 16, 4)).signals.seen_by(frozenset({"keys"}), "scorer 'foreign'")
    with pytest.raises(InputError, match="scorer 'foreign' reads the signal 'keys', which nothing has recorded here"):
        seen.recorded["keys"]
    assert seen.get("keys") is None and list(seen.recorded) == []


def test_undeclared_attention_is_told_inside_groups_too() -> None:
    sampler = ForeignSampler()
    sampler.forward = lambda tokens, scores, count: tokens.attention.scores(None)
    with pytest.raises(InputError, match="sampler 'foreign' reads attention, but does not declare it"):
        stage(sampler=sampler, grouper=ForeignGrouper(HALVES, (1, 2, 4)))(ONE)


def test_rater_weights_go_to_parts_that_declare_them() -> None:
    seen: dict[str, Any] = {}

    class Curious(RasterScorer):
        def forward(self, tokens: Tokens, raters: Tensor | None = None) -> Tensor:
            seen["raters"] = raters
            return super().forward(tokens)

    class Declared(Curious):
        reads = Needs(raters=True)

    tokens = Tokens.from_hidden(torch.randn(1, 16, 8), text=torch.randn(1, 3, 8))
    stage(scorer=Curious(), raters=LastTextRaters())(tokens)
    assert seen["raters"] is None
    stage(scorer=Declared(), raters=LastTextRaters())(tokens)
    assert seen["raters"].tolist() == [[0, 0, 1]]


def test_a_stage_checks_what_it_is_made_of() -> None:
    class Attentive(TopKSampler):
        reads = Needs(attention="previous")

    with pytest.raises(RecipeError, match=r"mine: positions='renum': .* \(did you mean 'renumber'\?\)"):
        stage(positions="renum")
    with pytest.raises(RecipeError, match="mine: scorer is recycler 'drop'; expected a Scorer"):
        stage(scorer=DropRecycler())
    with pytest.raises(RecipeError, match="mine: scorer is 'norm'; expected a Scorer"):
        stage(scorer="norm")
    with pytest.raises(RecipeError, match=r"sampler 'attentive' reads attention, .* leave out the grouper"):
        stage(sampler=Attentive(), grouper=ForeignGrouper(HALVES, (1, 2, 4)))
    with pytest.raises(RecipeError, match="expected numbers of layers, at least 1"):
        Needs(earlier=True)
    with pytest.raises(RecipeError, match="expected numbers of layers, at least 1"):
        Needs(earlier=1.5)  # type: ignore[arg-type]
