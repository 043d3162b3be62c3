"""From image-text pairs in WebDataset shards to the batches of a global, exactly repeatable order."""
