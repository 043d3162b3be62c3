"""The formats of `mmrl export --format`, one file per format; `base` has the registry."""
