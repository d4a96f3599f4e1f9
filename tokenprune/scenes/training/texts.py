"""Text for the decoder alone: words that repeat an earlier word, mostly a recent one.

Language models learn from text that what was said last matters most, and FEATHER (section 3) blames the decay of
attention with distance for the choice of the bottom rows of a picture. A decoder that has seen pictures only has no
reason for it, so the embedded model gets this phase; `uniform` lags and no text are the controls.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenprune.scenes.world.questions import words
from tokenprune.scenes.world.vocabulary import BOS, token_ids

LAGS = ("recent", "uniform", "none")
"""How far back a word is repeated: the share of lag d falls as 1/d, all alike, or no text at all."""
LENGTH = 176
"""Words of one text: as long as a picture and a question."""
_REPEATED = 0.75
_MARKOV = 0.2
_FOLLOWERS = 4


def texts(seed: int, first: int, size: int, lags: str) -> NDArray[np.int64]:
    """`size` texts of training stream `seed` from number `first` on: ids `[size, 1 + LENGTH]`, `<s>` first.

    Four in five repeat each word with probability 3/4 from `lags` words ago; the rest follow a fixed random grammar in
    which a word has four possible followers.
    """
    if lags not in LAGS[:2]:
        raise ValueError(f"lags: expected one of {', '.join(LAGS[:2])}, got {lags!r}")
    rng = np.random.default_rng((seed, first, 4))
    ids = token_ids()
    made = rng.integers(len(_words()), size=(size, LENGTH))
    repeated = rng.random((size, LENGTH)) < _REPEATED
    share = rng.random((size, LENGTH))
    markov = rng.random(size) < _MARKOV
    follower = rng.integers(_FOLLOWERS, size=(size, LENGTH))
    rows = np.arange(size)
    for place in range(1, LENGTH):
        # The inverse of a 1/d distribution over 1 .. place is place ** share.
        lag = place ** share[:, place] if lags == "recent" else 1 + share[:, place] * (place - 1)
        copied = made[rows, place - np.minimum(lag.astype(np.int64), place)]
        made[:, place] = np.where(repeated[:, place], copied, made[:, place])
        made[:, place] = np.where(markov, _grammar()[made[:, place - 1], follower[:, place]], made[:, place])
    start = np.full((size, 1), ids[BOS])
    return np.concatenate([start, np.asarray(_words())[made]], axis=1)


@cache
def _words() -> tuple[int, ...]:
    ids = token_ids()
    return tuple(ids[word] for word in words())


@cache
def _grammar() -> NDArray[np.int64]:
    """Followers of every word `[words, 4]`; the same for all texts and seeds."""
    return np.random.default_rng(0).integers(len(_words()), size=(len(_words()), _FOLLOWERS))
