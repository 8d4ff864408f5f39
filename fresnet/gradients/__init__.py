"""Per-sample gradients, their norms, and their clipped sum."""
