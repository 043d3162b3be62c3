"""`mmrl rotate`: an orthogonal matrix that makes a trained encoder's prefixes usable."""
