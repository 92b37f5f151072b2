"""How clients' jobs are answered: gradient steps, scores, features, text."""

from fedfm.train.trainer import Trainer

__all__ = ["Trainer"]
