"""Measurements of recipes: accuracy, time, and where in the picture tokens are kept."""
