"""How clients' jobs are answered: gradient steps, scores, features, text."""

from fedfm.train.fused import Fused
from fedfm.train.trainer import Trainer

__all__ = ["Fused", "Trainer"]
