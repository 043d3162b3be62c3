"""Nested losses of embeddings (not of models). tests/helpers/reference.py has the plain formulas."""
