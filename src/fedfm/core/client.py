"""Client work, run step by step: whoever answers the jobs decides how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedfm.core.jobs import Job
from fedfm.core.method import Method
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import ClientError, FedfmError, LateClient, Stopped


@dataclass
class View:
    """A client during one task. Made for the task and thrown away after it.

    Args:
        member: who it is.
        round: number of the round, from 1.
        private: its private state after the last accepted task; empty when there is none.
        kept: what ``keep`` was given; the link stores it once the update is accepted.
    """

    member: Member
    round: int
    private: Tensors = field(default_factory=dict)
    kept: Tensors | None = None

    def keep(self, tensors: Tensors) -> None:
        """Replace the private state."""
        self.kept = dict(tensors)


def work(method: Method, phase: str, client: View, message: Tensors, answer: Callable[[Job, View], Any]) -> Update:
    """Run the method's task ``phase`` on a client to its end, one job after another.

    Raises:
        ClientError: something went wrong; names client, round, task and job.
        LateClient: the deadline passed.
        Stopped: the user stopped the run.
    """
    job: Job | None = None
    try:
        flow = getattr(method, phase)(client, message)
        result: Any = None
        while True:
            try:
                job = flow.send(result)
            except StopIteration as end:
                return end.value
            result = answer(job, client)
            job = None
    except Stopped:
        raise
    except Exception as error:
        kind = LateClient if isinstance(error, TimeoutError) else ClientError
        known = isinstance(error, (FedfmError, TimeoutError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        at = type(job).__name__ if job else None
        raise kind(reason, client=client.member.id, round=client.round, phase=phase, job=at) from error
