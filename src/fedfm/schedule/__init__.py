"""When the server acts on what arrives."""

from fedfm.schedule.schedule import Schedule
from fedfm.schedule.synchronous import Synchronous

__all__ = ["Schedule", "Synchronous"]
