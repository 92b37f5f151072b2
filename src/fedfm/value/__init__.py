"""What clients' contributions are worth: audits that look at all that the server sees of a round."""

from fedfm.value.audit import Audit

__all__ = ["Audit"]
