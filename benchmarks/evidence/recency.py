"""How far back a decoder looks in text: the share of attention by distance, layer by layer."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tokenprune.scenes.training.texts import LENGTH, texts
from tokenprune.scenes.world.generate import TEST_SEEDS
from tokenprune.scenes.world.vocabulary import VISION_TOKENS

BINS = ((1, 8), (9, 32), (33, 88))


@torch.no_grad()
def recency(model: PreTrainedModel, size: int = 32) -> list[dict[str, float]]:
    """For each layer, attention at distances 1-8, 9-32 and 33-88 over what even attention would give.

    Held-out texts without a picture, at the positions that texts have in training; queries in their second half, mean
    over heads; the first token is left out.
    """
    ids = torch.from_numpy(texts(TEST_SEEDS[0], 0, size, "recent"))
    positions = VISION_TOKENS + 1 + torch.arange(ids.shape[1])[None]
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        decoder = model.model.language_model
        maps = decoder(input_ids=ids, position_ids=positions, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    queries = torch.arange(LENGTH // 2 + 1, LENGTH + 1)
    found = []
    for attention in maps:
        share = attention.mean((0, 1))[queries]
        distance = queries[:, None] - torch.arange(LENGTH + 1)[None]
        even = (1 / (queries[:, None] + 1)).expand_as(share)
        inside = {f"{low}-{high}": (distance >= low) & (distance <= high) for low, high in BINS}
        found.append({name: float(share[mask].sum() / even[mask].sum()) for name, mask in inside.items()})
    return found
