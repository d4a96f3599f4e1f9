"""Figures: what was kept, accuracy, times, layers, audits."""
