"""Recyclers: what becomes of the vision tokens that were not kept."""
