"""How embeddings are stored in fewer bytes: one table of codecs for evaluation, `mmrl embed` and `mmrl index`."""
