"""Position ids of the control experiments: which ids change, and that the decoder really reads them."""

from __future__ import annotations

import pytest
import torch

from tokenprune.scenes.training.model import build_config, build_model
from tokenprune.scenes.training.positions import POSITIONS, position_table, read_positions
from tokenprune.scenes.world.vocabulary import GRID, VISION_TOKENS

LENGTH = VISION_TOKENS + 20


def test_tables_change_vision_tokens_alone() -> None:
    plain = torch.arange(LENGTH)
    assert torch.equal(position_table("raster", LENGTH), plain)
    for positions in ("reversed", "equal"):
        table = position_table(positions, LENGTH)
        assert table[0] == 0 and torch.equal(table[VISION_TOKENS + 1 :], plain[VISION_TOKENS + 1 :])
    rows = position_table("reversed", LENGTH)[1 : VISION_TOKENS + 1].view(GRID, GRID)
    assert rows[0, 0] == (GRID - 1) * GRID + 1 and rows[-1, -1] == GRID
    assert (rows.diff(dim=1) == 1).all() and (rows.diff(dim=0) == -GRID).all()
    assert position_table("equal", LENGTH)[1 : VISION_TOKENS + 1].unique().tolist() == [VISION_TOKENS]
    assert not position_table("none", LENGTH).any()
    with pytest.raises(ValueError, match="positions: expected one of raster, reversed, equal, none, got 'raste'"):
        position_table("raste", LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_decoder_reads_the_table(positions: str) -> None:
    model = build_model(build_config(layers=2)).model.language_model
    hidden = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    table = position_table(positions, 1024)
    untouched = model(inputs_embeds=hidden).last_hidden_state
    given = model(inputs_embeds=hidden, position_ids=table[:LENGTH][None]).last_hidden_state
    whole = build_model(build_config(layers=2))
    handle = read_positions(whole, table)
    read = whole.model.language_model(inputs_embeds=hidden).last_hidden_state
    assert torch.equal(read, given)
    assert torch.equal(read, untouched) == (positions == "raster")
    handle.remove()
    assert torch.equal(whole.model.language_model(inputs_embeds=hidden).last_hidden_state, untouched)
