"""Stored encoders opened for inference: `mmrl.load`."""
