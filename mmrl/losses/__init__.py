"""Losses take embeddings, never a model. Start with reference.py."""
