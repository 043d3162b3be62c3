"""What `mmrl export --format` writes, one file a format; `base` has the registry."""
