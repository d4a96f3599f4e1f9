"""Tiny random models of every family, one file for relatives; `families.py` builds them and their prompts."""

from __future__ import annotations

from family_models import (
    cohere,
    gemma,
    glm,
    hybrids,
    idefics,
    internvl,
    llava,
    minicpm,
    mistral,
    molmo,
    others,
    qwen,
    timm_towers,
)
from family_models.tiny import Tiny

_FILES = (llava, qwen, internvl, gemma, cohere, idefics, mistral, glm, hybrids, others, minicpm, molmo, timm_towers)
MODELS: dict[str, Tiny] = {tiny.name: tiny for file in _FILES for tiny in file.MODELS}
"""By name, in the order of the rows of docs/models.md."""
