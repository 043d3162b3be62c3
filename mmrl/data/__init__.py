"""The data pipeline: image-text pairs in WebDataset shards -> batches in a reproducible global order."""
