"""What an evaluation derives from embeddings: baselines, compression, advice, confidence intervals."""
