"""DeepSpeed engine, GradCache, optimizer, checkpoints and metrics of a training run."""
