"""Groupers: how vision tokens are split, so that each part of a picture or video gets its share of the budget."""
