"""Everything that knows transformers: adapters of model families, cache layers, and the hooks that shorten the sequence."""
