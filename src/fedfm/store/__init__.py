"""What outlives the process: run folders, checkpoints, clients' private state."""

from fedfm.store.checkpoint import Checkpoints
from fedfm.store.clients import ClientStore
from fedfm.store.folder import RunFolder

__all__ = ["Checkpoints", "ClientStore", "RunFolder"]
