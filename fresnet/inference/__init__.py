"""A network frozen into the fastest callable, for each kind of processor."""
