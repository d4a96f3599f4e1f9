"""How long each recipe's own stages take beside the prefill that they leave: python benchmarks/performance/methods.py

On random tensors of LLaVA-1.5-7B's sizes, float32: 2880 vision tokens of five pictures, 64 of text, `keep: 0.25`. The
prefill is that of the decoder alone, from one layer of this shape that is timed at several lengths; between them it is
interpolated. Writes methods.json beside this file; docs/methods.md shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import tokenprune as tp
from tokenprune.budget import tokens_per_layer
from tokenprune.core.attention import attention_from_qk
from tokenprune.core.tokens import Tokens
from tokenprune.pipeline import Pipeline
from tokenprune.recipe import list_recipes, load_recipe

PICTURES, SIDE, TEXT = 5, 24, 64
WIDTH, HEADS, LAYERS, MLP = 4096, 32, 32, 11008
TOWER_WIDTH, TOWER_HEADS = 1024, 16
KEEP, RUNS = 0.25, 2
"""Of the runs the quickest counts: what disturbs one makes it slower."""
LENGTHS = (64, 424, 784, 1504, 2944)
UNBUDGETED = {"vtw"}
"""Recipes that a budget does not change; `none` has no stages."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--recipe", action="append", help="only this one; repeatable, and nothing is written")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = Path(__file__).with_name("methods.json")
    layer = json.loads(path.read_text())["layer"] if given.recipe else {str(n): layer_seconds(n) for n in LENGTHS}
    print(json.dumps(layer), flush=True)
    rows = {}
    for name in given.recipe or [name for name in list_recipes() if name != "none"]:
        pipeline = tp.build(load_recipe(name, **({} if name in UNBUDGETED else {"keep": KEEP})), depth=LAYERS)
        stages = [min(each) for each in zip(*(list(timed(pipeline)) for _ in range(RUNS)), strict=True)]
        left = prefill(pipeline, layer)
        rows[name] = {"seconds": round(sum(stages), 4), "prefill": round(left, 2), "share": sum(stages) / left}
        print(f"{name}: {sum(stages):.3f} s, {rows[name]['share']:.2%}", flush=True)
    machine = {"device": platform.machine(), "threads": given.threads, "torch": torch.__version__}
    if not given.recipe:
        path.write_text(json.dumps({**machine, "keep": KEEP, "layer": layer, "recipes": rows}, indent=1) + "\n")


def timed(pipeline: Pipeline) -> Iterator[float]:
    """Seconds of the stages at each place in turn, each on what the ones before have left."""
    tokens = None
    for place, (first, *_) in groupby(pipeline, key=lambda stage: stage.place):
        inside = place.kind == "in_vision"
        tokens = plain_tokens(pipeline, inside=inside) if tokens is None else tokens
        if first.reads.attention:
            tokens = attended(tokens, next(iter(first.reads.attention)))
        start = perf_counter()
        tokens = pipeline.run(place, tokens)[-1].tokens
        yield perf_counter() - start


def plain_tokens(pipeline: Pipeline, *, inside: bool) -> Tokens:
    """Vision tokens that are alike to a degree, with every signal that the parts declare to read.

    Inside the tower each picture is a sample of its own.
    """
    generator = torch.Generator().manual_seed(0)
    batch, grid = (PICTURES, (1, SIDE, SIDE)) if inside else (1, (PICTURES, SIDE, SIDE))
    n = PICTURES * SIDE**2 // batch

    def features(width: int) -> torch.Tensor:
        few = torch.randn(batch, n, 64, generator=generator) @ torch.randn(64, width, generator=generator)
        return few + torch.randn(batch, n, width, generator=generator)

    def of(name: str) -> torch.Tensor:
        signal = name.partition("@")[0]
        if signal.endswith("attention"):
            return torch.rand(batch, n, generator=generator).softmax(1)
        if signal == "keys":
            return features(TOWER_WIDTH).unflatten(2, (TOWER_HEADS, -1))
        if signal in ("layer_keys", "layer_queries"):
            return features(WIDTH).unflatten(2, (HEADS, -1))
        return features(TOWER_WIDTH if signal == "hidden" else WIDTH)

    text, states = torch.randn(2, batch, TEXT, WIDTH, generator=generator)
    keys = torch.randn(batch, TEXT, HEADS, WIDTH // HEADS, generator=generator)
    first, second = torch.randn(TOWER_WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)
    tokens = Tokens.from_hidden(
        features(TOWER_WIDTH if inside else WIDTH),
        grid=grid,
        text=text,
        text_states=states,
        text_keys=keys,
        signals={name: of(name) for name in sorted({name for stage in pipeline for name in stage.reads.signals})},
    )
    return dataclasses.replace(tokens, projector=lambda x: torch.nn.functional.gelu(x @ first) @ second)


def attended(tokens: Tokens, layer: Any) -> Tokens:
    """`tokens` with attention of random queries and keys, the text behind them."""
    n = tokens.valid.shape[1]
    q, k = torch.randn(2, 1, HEADS, n + TEXT, WIDTH // HEADS)
    made = attention_from_qk(
        q, k, vision=torch.arange(n)[None], text=torch.arange(n, n + TEXT), before_rope=(q, k), layer=layer
    )
    ones = torch.ones(1, 1, n + TEXT, WIDTH // HEADS)
    made = dataclasses.replace(made, kernel=lambda layer: (ones[:, :, n:], ones))
    return dataclasses.replace(tokens, attention=made)


def layer_seconds(length: int) -> float:
    """A forward of one decoder layer on so many tokens."""
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=MLP, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).eval()
    x = torch.randn(1, length, WIDTH)
    turned = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    layer(x[:, :8], position_embeddings=tuple(each[:, :8] for each in turned))
    start = perf_counter()
    layer(x, position_embeddings=turned)
    return round(perf_counter() - start, 4)


def prefill(pipeline: Pipeline, layer: dict[str, float]) -> float:
    """Seconds of the decoder on what the recipe leaves."""
    total, grid = PICTURES * SIDE**2, (PICTURES, SIDE, SIDE)
    counts = [count or 0 for count in pipeline.plan(total, [grid])]
    entering = np.array(tokens_per_layer(pipeline.steps(), counts, LAYERS, total)) + TEXT
    return float(np.interp(entering, [int(n) for n in layer], list(layer.values())).sum())


if __name__ == "__main__":
    main()
