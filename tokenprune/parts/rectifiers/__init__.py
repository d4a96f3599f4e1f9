"""Rectifiers: what is added to the attention that survivors get, because they stand for tokens that are gone."""
