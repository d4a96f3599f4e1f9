"""Tiny random models of every family, one file for relatives; `families.py` builds them and their prompts."""

from __future__ import annotations

from family_models import internvl, llava, qwen
from family_models.tiny import Tiny

MODELS: dict[str, Tiny] = {tiny.name: tiny for group in (llava, qwen, internvl) for tiny in group.MODELS}
"""By name; docs/models.md has a row for each."""
