"""The command line."""

from fedfm.cli.app import main

__all__ = ["main"]
