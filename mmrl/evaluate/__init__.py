"""How good is each dim? Retrieval at every prefix, and the report."""
