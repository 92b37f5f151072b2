"""Every error that fedfm raises on purpose.

FedfmError
├── RecipeError            a recipe, an option or an argument that cannot be used
│   └── Incompatible       parts that do not compose (raised when a federation is built)
├── DataError              a data source, column, partition or client that cannot be used
├── ModelError             a model, tokenizer or architecture that cannot be loaded or understood
├── StoreError             a run folder or checkpoint that cannot be written or read
├── ClientError            the work of one client failed; carries client, round, phase and job
│   └── LateClient         it did not finish before its deadline
├── BadUpdate              what a client sent cannot be accepted
├── NoUpdates              a round in which nobody's update could be used
│   └── TooFewUpdates      a round in which fewer could be used than it needs
└── Stopped                the user asked the run to stop

The command line prints the message of any of these on one line and exits non-zero; anything else is a defect of
fedfm and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedfmError(Exception):
    """Base of all errors below."""


class RecipeError(FedfmError):
    """A recipe, an option or an argument that cannot be used."""


def require(part: object, name: str, holds: bool, allowed: str) -> None:
    """Raise :class:`RecipeError` unless a setting of a part is one that is allowed.

    Args:
        part: whose setting.
        name: of the setting.
        holds: whether it is allowed.
        allowed: what is, in words that go on after "must be".
    """
    if not holds:
        raise RecipeError(f"{type(part).__name__} {name} must be {allowed}, but is {getattr(part, name)!r}.")


class Incompatible(RecipeError):
    """Two parts that do not compose; says who needs what, who takes it away, and what to do instead."""


class DataError(FedfmError):
    """A data source, column, partition or client that cannot be used."""


class ModelError(FedfmError):
    """A model, tokenizer or architecture that cannot be loaded or understood."""


class StoreError(FedfmError):
    """A run folder or checkpoint that cannot be written or read."""


class ClientError(FedfmError):
    """The work of one client failed.

    Args:
        reason: what went wrong.
        client: id of the client.
        round: number of the round, from 1.
        phase: name of the method's task, such as ``local``.
        job: the job that was being answered, or ``None`` between jobs.
    """

    def __init__(self, reason: str, *, client: str, round: int, phase: str, job: str | None) -> None:
        super().__init__(f"client {client!r}, round {round}, task {phase!r}, job {job or 'none'}: {reason}")
        self.reason = reason
        self.client = client
        self.round = round
        self.phase = phase
        self.job = job


class LateClient(ClientError):
    """The client did not finish before its deadline."""


class BadUpdate(FedfmError):
    """What a client sent cannot be accepted; the message is the reason recorded with the dropped client."""


class NoUpdates(FedfmError):
    """Nobody's update could be used in this round."""


class TooFewUpdates(NoUpdates):
    """Fewer updates could be used than a round needs, so it does not count; not even noise is released."""


class Stopped(FedfmError):
    """The user asked the run to stop; the last finished round is in the checkpoint."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string.

    >>> nearest("learning_rte", ["learning_rate", "max_steps"])
    " Did you mean 'learning_rate'?"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
