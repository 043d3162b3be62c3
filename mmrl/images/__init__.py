"""Decode images, preprocess them for a tower, and draw contact sheets."""
