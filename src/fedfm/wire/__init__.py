"""What happens to an update between client work and ``combine``."""

from fedfm.wire.clip import Clip
from fedfm.wire.stage import Stage

__all__ = ["Clip", "Stage"]
