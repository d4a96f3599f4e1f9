"""TopV's scorer: plain Python's plan; a choice that the printed plan cannot make."""

from __future__ import annotations

import dataclasses

import numpy as np
import plain_transport as plain
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.core.signals import Signal
from tokenprune.core.tokens import Tokens
from tokenprune.parts.scorers.transport import TransportScorer


@settings(max_examples=40)
@given(strategies.samples(least=1, whole=True), st.sampled_from([0.1, 1.0]), st.sampled_from([1.5, 10.0]))
def test_scores_are_plain_pythons(sample: strategies.Sample, temperature: float, spread: float) -> None:
    tokens = strategies.collate([sample])
    weights = {"features": 0.7, "places": 1.3, "centre": 0.4}
    scores = TransportScorer(**weights, temperature=temperature, spread=spread)(tokens)
    before, now = (x[0].double().numpy() for x in (tokens.signal("earlier_1"), tokens.hidden))
    grids = [tuple(grid) for grid in tokens.grids[0]]
    expected = plain.transport(before, now, grids, tuple(weights.values()), spread, temperature)  # type: ignore[arg-type]
    assert np.abs(scores[0].double().numpy() - expected).max() < 1e-5
    assert float(scores.sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_token_that_is_what_a_layer_adds_is_asked_most() -> None:
    """The layer adds one and the same thing everywhere, and one token is just that."""
    before = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(0))
    added = before[:, 7:8].expand_as(before)
    tokens = Tokens.from_hidden(before + added, signals={"earlier_1": before})
    scores = TransportScorer(places=0.0, centre=0.0)(tokens)
    assert int(scores.argmax()) == 7


def test_the_middle_is_cheapest_where_all_else_is_equal() -> None:
    tokens = Tokens.from_hidden(torch.zeros(1, 25, 4), signals={"earlier_1": torch.zeros(1, 25, 4)})
    assert int(TransportScorer(places=0.0, centre=1.0)(tokens).argmax()) == 12
    shifted = dataclasses.replace(tokens, signals=tokens.signals.adding({"earlier_1": Signal(torch.zeros(1, 25, 4))}))
    assert TransportScorer(places=0.0, centre=0.0)(shifted).unique().numel() == 1
