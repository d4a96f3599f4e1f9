"""Greedy answers to many questions about few pictures, with what the questions share computed once."""
