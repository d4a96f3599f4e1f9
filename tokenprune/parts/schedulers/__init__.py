"""Schedulers: how many vision tokens survive a stage."""
