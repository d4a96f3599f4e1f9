"""FLOP ledger: what a recipe saves and costs, from the numbers of a model's configuration, without weights."""
