"""Server rules: how the combined update changes the shared weights."""

from fedfm.rules.adagrad import Adagrad
from fedfm.rules.adam import Adam
from fedfm.rules.add import Add
from fedfm.rules.momentum import Momentum
from fedfm.rules.yogi import Yogi

__all__ = ["Adagrad", "Adam", "Add", "Momentum", "Yogi"]
