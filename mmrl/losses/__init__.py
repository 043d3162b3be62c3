"""Nested losses of embeddings (not of models). Read reference.py first: the plain formulas."""
