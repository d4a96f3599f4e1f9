"""Rater selectors: which text tokens have a say about the vision tokens."""
