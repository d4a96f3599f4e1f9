"""`Likest` against the plain maximum, round by round, as members go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.core import likest
from tokenprune.core.likest import Likest


@pytest.mark.parametrize("near", [1, 3, 32])
@given(data=st.data())
def test_it_is_the_maximum_over_the_members(near: int, data: st.DataObject) -> None:
    """However few tokens each remembers: who has lost all of them looks at all members again."""
    batch, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    similarity = torch.randint(-4, 5, (batch, n, n), generator=generator) / 4
    stays = torch.rand(batch, n, generator=generator) < 0.9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likest, "NEAR", near)
        remembering, going_over = Likest(similarity), Likest(similarity)
        going_over._sparse = False
        for _ in range(4):
            members = stays & (torch.rand(batch, n, generator=generator) < 0.5)
            tokens = torch.randint(-1, n, (batch, 5), generator=generator)
            found = remembering(tokens, members, stays), going_over(tokens, members, stays)
            for row in range(batch):
                for place, token in enumerate(tokens[row].tolist()):
                    own = [float(similarity[row, token, j]) for j in range(n) if members[row, j]]
                    if token >= 0:
                        assert {float(like[row, place]) for like in found} == {max(own, default=-2.0)}
            stays = stays & (torch.rand(batch, n, generator=generator) < 0.6)
