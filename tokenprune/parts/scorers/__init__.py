"""Scorers: one float32 per vision token; higher survives."""
