"""`mmrl pack`: a folder or a table of image-text pairs -> shards."""
