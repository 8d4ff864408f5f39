"""Batch statistics as a value: moments that merge, and what becomes of them."""

from fresnet.network.moments import merge, merge_across, statistics, update

__all__ = ["merge", "merge_across", "statistics", "update"]
