"""What commands say of tokens that skip feed-forwards: they have not left the sequence, and something was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def test_run_tells_what_skips(cli: Callable[..., Any]) -> None:
    told = json.loads(cli("run", "-r", "skip-vision", "--keep", "0.25", "--json").out)
    assert told["vision_tokens"] == [144] * 8
    assert told["feed_forward_tokens"] == [36] * 8
    assert told["saved"] == 0
    words = " ".join(cli("run", "-r", "skip-vision", "--keep", "0.25").out.split())
    assert "0% of the vision tokens saved on average over 8 layers, in feed-forwards 75%" in words
    assert "36 of 144 left at the end" in words


def test_show_tells_what_its_numbers_are_of(cli: Callable[..., Any]) -> None:
    words = " ".join(cli("show", "skip-vision").out.split())
    assert "attention sees the others, too" in words
    assert "attention sees the others, too" not in " ".join(cli("show", "uniform").out.split())
    assert "tokenprune fit" not in words.partition("parts")[0], "it needs no weights"
