"""`mmrl train` and `mmrl plan`."""
