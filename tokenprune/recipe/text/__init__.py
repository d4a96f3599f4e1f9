"""YAML text with the position of every value; knows nothing of recipes."""
