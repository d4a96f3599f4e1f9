"""Molmo 2: an overview and crops of a picture, pooled by attention in squares whose patches the processor names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from family_models.tiny import IMAGE, SEPARATOR, Size, Tiny, scale, text

SIDE = 6
"""Patches along a side of a crop; 2 x 2 are a token."""


class Molmo2(Tiny):
    """``[crops, 36, 48]``, the patches of each token, and rows and columns of overview and of crops; words between.

    Vision tokens are added to the embedding of their placeholder, and see each other in both directions. Every other
    decoder layer has a rotary embedding of its own.
    """

    name, kinds = "molmo2", "mm_token_type_ids"
    sizes = ((1, 1), (1, 2), (2, 1))  # crops down and across: 18, 27, 27 tokens

    def config(self) -> tuple[Any, Any]:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 32}
        vision = {"image_size": [24, 24], "patch_size": 4, "intermediate_size": 64, "num_hidden_layers": 3}
        adapter = {"vision_feature_layer": [2, 0], "intermediate_size": 64, "text_hidden_size": 64}
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        words = text(head_dim=16, additional_vocab_size=0, rope_parameters=rope, rope_scaling_layers=[1, 3, 5, 7])
        config = tf.Molmo2Config(
            vision_config=vision | heads,
            adapter_config=adapter | heads,
            text_config={name: value for name, value in words.items() if not name.endswith("token_id")},
            image_patch_id=IMAGE,
        )
        return tf.Molmo2ForConditionalGeneration, config

    def finish(self, model: Any) -> None:
        """Pictures must count beside the placeholder that they are added to, and trained norms make attention sharp."""
        scale(model, r"vision_tower\.(patch|positional)_embedding", 8.0)
        scale(model, r"multi_modal_projector\.image_projector\..*weight", 6.0)
        scale(model, r"language_model\..*q_norm\.weight", 3.0)

    def tokens(self, model: Any, size: Size) -> int:
        return (1 + size[0] * size[1]) * (SIDE // 2) ** 2

    def placeholders(self, model: Any, size: Size) -> Tensor:
        """Rows of the overview, then of the crops, with a word at the end of each."""
        side = SIDE // 2
        overview, crops = [*[IMAGE] * side, SEPARATOR] * side, [*[IMAGE] * side * size[1], SEPARATOR] * side * size[0]
        return torch.tensor([*overview, *crops])

    def noise(self, model: Any, images: Sequence[Size], random: torch.Generator) -> dict[str, Tensor]:
        crops, pooled, grids, at = [], [], [], 0
        for down, across in images:
            count = 1 + down * across
            crops.append(torch.randn(count, SIDE**2, 48, generator=random))
            index = at + torch.arange(count * SIDE**2).view(count, SIDE, SIDE)
            whole = index[1:].view(down, across, SIDE, SIDE).transpose(1, 2).reshape(down * SIDE, across * SIDE)
            pooled += [plane.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4) for plane in (index[0], whole)]
            grids.append([SIDE // 2, SIDE // 2, down * SIDE // 2, across * SIDE // 2])
            at += count * SIDE**2
        counts = [len(own) for own in crops]
        return {
            "pixel_values": torch.cat(crops),
            "image_token_pooling": torch.cat(pooled),
            "image_grids": torch.tensor(grids),
            "image_num_crops": torch.tensor(counts),
        }

    def images(self, batch: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        crops, grids = batch["image_num_crops"], batch["image_grids"]
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        start, end = int(crops[:first].sum()), int(crops[:last].sum())
        own = slice(int(tokens[:first].sum()), int(tokens[:last].sum()))
        return {
            "pixel_values": batch["pixel_values"][start:end],
            "image_token_pooling": batch["image_token_pooling"][own] - start * SIDE**2,
            "image_grids": grids[first:last],
            "image_num_crops": crops[first:last],
        }


MODELS: tuple[Tiny, ...] = (Molmo2(),)
