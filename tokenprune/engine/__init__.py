"""Everything that knows transformers: families, cache layers, and the hooks that shorten the sequence."""
