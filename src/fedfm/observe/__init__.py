"""Who watches a run: progress, event files, logs."""

from fedfm.observe.observer import Observer

__all__ = ["Observer"]
