"""Samplers: which vision tokens survive, from scores and a count."""
