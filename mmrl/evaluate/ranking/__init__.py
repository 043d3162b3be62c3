"""Exact ranks, recall, average precision and nDCG at every dim."""
