"""`mmrl pack`: packs a folder or a table of image-text pairs into shards."""
