"""Image files -> pixels -> tensors."""
