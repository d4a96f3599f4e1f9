"""Tests for models and families of your own: the contract that every family of tokenprune is held to."""

from tokenprune.testing.family import Finding, Findings, check_family
from tokenprune.testing.reference import Hidden, masked_reference, vision_mask
from tokenprune.testing.runs import run_both

__all__ = ["Finding", "Findings", "Hidden", "check_family", "masked_reference", "run_both", "vision_mask"]
