"""How the server reaches clients."""

from fedfm.links.inprocess import InProcess
from fedfm.links.link import Link, Reply

__all__ = ["InProcess", "Link", "Reply"]
