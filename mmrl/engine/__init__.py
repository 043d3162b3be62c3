"""DeepSpeed, optimizer, gradient accumulation, checkpoints and logs of a run."""
