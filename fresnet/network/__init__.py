"""The network: its nodes, its operations, and its pure functions."""
