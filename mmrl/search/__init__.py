"""Image search: embed a set of images, index the embeddings, search and serve the index."""
