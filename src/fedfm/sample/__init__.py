"""Who takes part in a round."""

from fedfm.sample.poisson import Poisson
from fedfm.sample.uniform import Uniform

__all__ = ["Poisson", "Uniform"]
