"""When the server acts on what arrives."""

from fedfm.schedule.synchronous import Synchronous

__all__ = ["Synchronous"]
