"""Analysis of embeddings beyond the scores: confidence intervals, baselines, compression, blocks of dims, advice."""
