"""How good models are, for each client and for all together."""

from fedfm.evaluate.assessment import Assessment, Evaluation, assess

__all__ = ["Assessment", "Evaluation", "assess"]
