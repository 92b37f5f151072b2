"""What stands between uploads and the mean to bear hostile clients: estimators instead of it, screens before it."""

from fedfm.robust.estimator import Estimator
from fedfm.robust.krum import Krum
from fedfm.robust.median import Median
from fedfm.robust.multi_krum import MultiKrum
from fedfm.robust.screen import Screen
from fedfm.robust.trimmed_mean import TrimmedMean

__all__ = ["Estimator", "Krum", "Median", "MultiKrum", "Screen", "TrimmedMean"]
