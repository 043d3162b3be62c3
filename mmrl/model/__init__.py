"""Towers, the two-tower model with nested embeddings, and the folder format of stored encoders."""
