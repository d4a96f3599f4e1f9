"""One stage: raters judge, a scorer scores, a scheduler counts, a sampler picks, a recycler deals with the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tokenprune.apart import Alone, run_apart
from tokenprune.core import ops, transfer
from tokenprune.core.groups import fold, unfold
from tokenprune.core.merge import reduce
from tokenprune.core.needs import Needs
from tokenprune.core.place import Place
from tokenprune.core.precision import without_autocast
from tokenprune.core.result import StageResult as StageResult
from tokenprune.core.tokens import Count, Tokens
from tokenprune.errors import RecipeError, did_you_mean
from tokenprune.parts.contract import Contract, shipped
from tokenprune.parts.groupers.base import Grouper
from tokenprune.parts.part import NOTHING, Part
from tokenprune.parts.raters.base import RaterSelector
from tokenprune.parts.rectifiers.base import Rectifier
from tokenprune.parts.recyclers.base import Recycler
from tokenprune.parts.recyclers.drop import DropRecycler
from tokenprune.parts.samplers.base import Sampler
from tokenprune.parts.samplers.by_score import TopKSampler
from tokenprune.parts.schedulers.base import Scheduler
from tokenprune.parts.schedulers.fixed import SolvedScheduler
from tokenprune.parts.scorers.base import Scorer
from tokenprune.parts.scorers.baseline import ConstantScorer

Positions = Literal["original", "renumber"]
Kv = Literal["later_layers", "all_layers"]
Dropped = Literal["leave", "skip_ffn"]
ROLE_CLASSES: dict[str, type[Part]] = {
    "raters": RaterSelector,
    "scorer": Scorer,
    "scheduler": Scheduler,
    "grouper": Grouper,
    "sampler": Sampler,
    "recycler": Recycler,
    "rectifier": Rectifier,
}


class Stage(nn.Module):
    """A place, and the parts that act there.

        tokens [B, N] ─▶ raters ─▶ scorer ─▶ scheduler ─▶ grouper ─▶ sampler ─▶ recycler ─▶ rectifier ─▶ tokens [B, K]
                         weights    scores    counts       counts     kept       plan        biases
                         [B, T]     [B, N]    [B]          by group   [B, K]     (Merge)     [B, K]

    A static scheduler, or a budget, gives the counts before anything else is asked; where all tokens are kept, nothing
    else is. Parts see what they have declared to read (`Part.reads`) and leave it as it is: the stage itself takes
    the survivors and applies the recycler's plan, so what it reports is what it did. What a part returns is held
    against its contract (`tokenprune.parts.contract`). Under autocast, parts compute as they do without it.

    Args:
        place: where; as a recipe writes it, or the number of a layer, also does.
        scheduler: how many tokens survive; as the budget of the whole pipeline says when left out (``solved``).
        scorer: what each is worth; all the same when left out (``constant``).
        sampler: which ones survive; the best when left out (``top_k``).
        recycler: what becomes of the rest; nothing when left out (``drop``).
        raters: whose attention counts, for parts that ask raters.
        grouper: how the count is shared out over the picture; None: the sample is one group.
        rectifier: what is added to later attention to the survivors; None: nothing.
        positions: survivors keep their ``original`` position ids, or ``renumber`` (fidelity to older code).
        kv: which caches lose the keys and values of what is dropped: those of ``later_layers``, which never get any;
            or of ``all_layers``: those before the place, too, once the prefill is over (GlimpsePrune).
        dropped: what becomes of the tokens that are not kept, from the place on: they ``leave`` the sequence; or they
            ``skip_ffn``: they stay in the attention of vision tokens, pass by the feed-forward, are hidden from text,
            and leave the caches once the prefill is over (Skip-Vision).
        name: how error messages and reports call it.

    Raises:
        RecipeError: a part of another role, unknown positions, kv or dropped, settings that do not go together, or a
            sampler by group that reads attention.
    """

    def __init__(
        self,
        *,
        place: Place | str | int | Mapping[str, Any],
        scheduler: Scheduler | None = None,
        scorer: Scorer | None = None,
        sampler: Sampler | None = None,
        recycler: Recycler | None = None,
        raters: RaterSelector | None = None,
        grouper: Grouper | None = None,
        rectifier: Rectifier | None = None,
        positions: Positions = "original",
        kv: Kv = "later_layers",
        dropped: Dropped = "leave",
        name: str = "stage",
    ) -> None:
        super().__init__()
        self.place = Place.parse({"before_layer": place} if isinstance(place, int) else place)
        self.positions = positions
        self.kv = kv
        self.dropped = dropped
        self.name = name
        self.raters = raters
        self.scorer = ConstantScorer() if scorer is None else scorer
        self.scheduler = SolvedScheduler() if scheduler is None else scheduler
        self.grouper = grouper
        self.sampler = TopKSampler() if sampler is None else sampler
        self.recycler = DropRecycler() if recycler is None else recycler
        self.rectifier = rectifier
        self._check()
        self.shared_raters = None if raters is None or not raters.per_prompt else repr(raters)
        """Equal for stages whose rater weights are the same throughout a prompt; None where they are not."""
        self.reads = _union(self.parts)
        """What its parts read together."""
        self._declared = {part.role: part.reads for part in self.parts}
        self._foreign = [part for part in self.parts if not shipped(part)]
        self._contract = Contract(f"{name} ({self.place})")

    def _check(self) -> None:
        """What the constructor was given, role by role."""
        for setting, choices in (("positions", Positions), ("kv", Kv), ("dropped", Dropped)):
            given, known = getattr(self, setting), get_args(choices)
            if given not in known:
                hint = did_you_mean(given, known)
                raise RecipeError(f"{self.name}: {setting}={given!r}: expected {' or '.join(known)}{hint}")
        if self.kv == "all_layers" and not self.place.in_decoder:
            raise RecipeError(f"{self.name}: kv='all_layers' without effect: no layer comes before {self.place}")
        if self.skips and (told := cannot_skip(self.place, self.positions, rectifies=self.rectifier is not None)):
            raise RecipeError(f"{self.name}: dropped='skip_ffn': {told}")
        for role, base in ROLE_CLASSES.items():
            part = getattr(self, role)
            if part is not None and not isinstance(part, base):
                got = part.title if isinstance(part, Part) else repr(part)
                raise RecipeError(f"{self.name}: {role} is {got}; expected a {base.__name__}, see tokenprune.part")
        if self.grouper is not None and self.sampler.reads.attention:
            told = f"{self.sampler.title} reads attention, which is not known group by group; leave out the grouper"
            raise RecipeError(f"{self.name}: {told}")

    @property
    def skips(self) -> bool:
        """Whether what it drops stays in the sequence, and passes by the feed-forward from its layer on."""
        return self.dropped == "skip_ffn"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that the stage has, in the order in which they act."""
        every: tuple[Part | None, ...] = (
            self.raters,
            self.scorer,
            self.scheduler,
            self.grouper,
            self.sampler,
            self.recycler,
            self.rectifier,
        )
        return tuple(part for part in every if part is not None)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, place={str(self.place)!r}, positions={self.positions!r}" + (
            (f", kv={self.kv!r}" if self.kv != "later_layers" else "")
            + (f", dropped={self.dropped!r}" if self.skips else "")
        )

    def forward(
        self,
        tokens: Tokens,
        count: Count | None = None,
        weights: Tensor | None = None,
        pictures: Sequence[Alone] = (),
    ) -> StageResult:
        """Reduce `tokens`.

        Args:
            tokens: N vision tokens.
            count: tokens to keep, when a budget for the whole recipe has fixed it; else the scheduler decides.
            weights: what `raters` would say, ``[B, T]``, where an earlier stage has asked the same ones.
            pictures: those of all samples, where each is to be reduced as if it were alone; their counts are used.

        Raises:
            InputError: a count beyond the tokens at hand, or a part that broke its contract.
        """
        if pictures:
            return run_apart(self.forward, tokens, pictures)
        with without_autocast(tokens.hidden.device):
            if not self._foreign or torch.compiler.is_compiling():
                return self._reduced(tokens, count, weights)
            writes = self._contract.writes(tokens)
            result = self._reduced(tokens, count, weights)
            self._contract.unchanged(self._foreign, tokens, writes)
        return result

    def _reduced(self, tokens: Tokens, count: Count | None, weights: Tensor | None) -> StageResult:
        contract = self._contract
        if count is None and self.scheduler.static:
            count = contract.fixed_counts(
                self.scheduler, self.scheduler(self._seen(tokens, self.scheduler), tokens.hidden), tokens
            )
        if count is not None and tokens.counts(count) == tokens.sizes:
            return self._untouched(tokens)
        weights = self.rater_weights(tokens, weights)
        scores = self.scorer(self._seen(tokens, self.scorer), self._rated(self.scorer, weights))
        contract.scores(self.scorer, scores, tokens)
        if count is None:
            decided = self.scheduler(self._seen(tokens, self.scheduler), scores, self._rated(self.scheduler, weights))
            count = contract.counts(self.scheduler, decided, tokens)
            if count == tokens.sizes:
                return self._untouched(tokens, weights)
        counts = tokens.counts(count)
        kept = self._pick(tokens, scores, counts)
        result = self._recycle(tokens, kept, scores, counts, weights)
        if self.rectifier is not None:
            bias = self.rectifier(self._seen(result.tokens, self.rectifier))
            contract.bias(self.rectifier, bias, result.tokens)
            same = [k == size for k, size in zip(counts, tokens.sizes, strict=True)]
            if any(same):  # alone, nothing would happen to them
                own = result.tokens.bias
                there = transfer.ints(same, bias.device).bool()[:, None]
                bias = torch.where(there, torch.zeros_like(bias) if own is None else own, bias)
            result = replace(result, tokens=replace(result.tokens, bias=bias))
        return result

    def rater_weights(self, tokens: Tokens, known: Tensor | None = None) -> Tensor | None:
        """What the raters say, ``[B, T]``, unless that is `known`; None without raters."""
        if known is not None or self.raters is None:
            return known
        weights: Tensor = self.raters(self._seen(tokens, self.raters))
        self._contract.raters(self.raters, weights, tokens)
        return weights

    def _pick(self, tokens: Tokens, scores: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Indices ``[B, K]`` of the survivors: of the whole sample, or group by group."""
        seen = self._seen(tokens, self.sampler)
        if self.grouper is None:
            kept: Tensor = self.sampler(seen, scores, counts)
            self._contract.kept(self.sampler, kept, counts, tokens)
            return kept
        groups = self.grouper(self._seen(tokens, self.grouper))
        self._contract.groups(self.grouper, groups, tokens)
        shares = self.grouper.share(groups, counts, scores)
        self._contract.shares(self.grouper, shares, counts, groups.sizes)
        folded = fold(seen, groups)
        each = tuple(share for sample in shares for share in sample)
        kept = self.sampler(folded.tokens, folded.of(scores, -torch.inf), each)
        self._contract.kept(self.sampler, kept, each, folded.tokens)
        return unfold(kept, folded, counts, tokens.valid.shape[1])

    def _recycle(
        self, tokens: Tokens, kept: Tensor, scores: Tensor, counts: tuple[int, ...], weights: Tensor | None
    ) -> StageResult:
        """What is left when the recycler's plan has been applied."""
        seen, recycler = self._seen(tokens, self.recycler), self.recycler
        plan = recycler(seen, kept, scores, counts)
        added = [recycler.added(size - k) for size, k in zip(tokens.sizes, counts, strict=True)]
        self._contract.plan(recycler, plan, added, kept, tokens)
        if plan is None:
            return StageResult(tokens.take(kept, counts), tokens.origin[:, :0], None, False, scores, weights)
        states = recycler.states(seen, plan)
        self._contract.states(recycler, states, plan, tokens)
        reduced, written = reduce(tokens, kept, counts, plan, states)
        return StageResult(
            reduced, _origins(tokens, plan.anchor, plan.anchors), written, plan.padded, scores, weights, plan
        )

    def _seen(self, tokens: Tokens, part: Part) -> Tokens:
        """The tokens as `part` may read them."""
        return tokens.seen_by(self._declared[part.role], part.title)

    def _rated(self, part: Part, weights: Tensor | None) -> Tensor | None:
        """The rater weights, for a part that has declared to read them."""
        return weights if self._declared[part.role].asks_raters else None

    def _untouched(self, tokens: Tokens, weights: Tensor | None = None) -> StageResult:
        return StageResult(tokens, tokens.origin[:, :0], None, False, None, weights)

    def explain(self, error: RuntimeError) -> None:
        """Raise `InputError` if `error` is what PyTorch makes of a broken contract at this stage."""
        self._contract.explain(error)


def cannot_skip(place: Place, positions: Positions, *, rectifies: bool) -> str | None:
    """Why the tokens that a stage drops cannot stay in the sequence and skip the feed-forward; None where they can.

    Args:
        place: of the stage.
        positions: what it does with position ids.
        rectifies: whether it has a rectifier.
    """
    if place.kind == "in_vision":
        return f"the feed-forward that is skipped is the language model's; put the stage behind the tower, not {place}"
    if positions == "renumber":
        return "dropped tokens stay where they are, so there is nothing to renumber; expected positions: original"
    if rectifies:
        return "a rectifier makes up for tokens that nobody sees any more, and these are seen; leave it out"
    return None


def _union(parts: Sequence[Part]) -> Needs:
    together = NOTHING
    for part in parts:
        together = together | part.reads
    return together


def _origins(tokens: Tokens, index: Tensor, counts: Sequence[int]) -> Tensor:
    if not ops.ragged(counts):
        return tokens.origin.gather(1, index)
    return tokens.origin.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
