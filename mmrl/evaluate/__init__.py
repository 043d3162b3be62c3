"""Evaluation at every dim: retrieval, zero-shot classification, analysis and the HTML report."""
