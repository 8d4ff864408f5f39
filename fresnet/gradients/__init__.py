"""Gradients of each image: themselves, their norms, and their clipped sum."""
