"""Weights under other names, in files, and in programs that run without fresnet."""
