"""What every other room builds on: tokens, places, attention, reports and pure tensor functions."""
