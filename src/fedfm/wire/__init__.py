"""What happens to an update between client work and ``combine``."""

from fedfm.wire.clip import Clip
from fedfm.wire.gaussian import Gaussian
from fedfm.wire.local_gaussian import LocalGaussian
from fedfm.wire.qsgd import QSGD
from fedfm.wire.stage import Stage
from fedfm.wire.topk import TopK

__all__ = ["QSGD", "Clip", "Gaussian", "LocalGaussian", "Stage", "TopK"]
