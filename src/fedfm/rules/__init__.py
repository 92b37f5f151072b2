"""Server rules: how the combined update changes the shared weights."""

from fedfm.rules.add import Add

__all__ = ["Add"]
