"""Trained encoders in use: `mmrl.load`."""
