"""`mmrl rotate`: an orthogonal matrix that makes the prefixes of a trained encoder usable, without training it."""
