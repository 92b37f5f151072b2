"""The link over a Ray cluster. The cluster is :mod:`fedfm.links.flower.simulation`.

::

    this process: rounds, checkpoints, private state         Ray workers, all alike, on any machine
    ------------------------------------------------         --------------------------------------
    RayLink.ask  -- a share of the clients:                  the federations, built once in each
                    messages, private state  ------------>   Worker.tasks
                 <-- updates, new private state ----------

A *share* is one Flower message. The sequential trainer gets one client a share, so that nobody waits; the fused one
gets its part of all clients, up to its group. Private state stays with the server: it goes with the message and comes
back with the reply, so which worker does a share changes nothing, and workers need no folder in common.

Where uploads are summed unseen, what clients keep of a round are secrets of theirs, which last for several questions.
They stay in this process, too: here keys are made, uploads masked or encrypted when they are back, and sums opened.
That is no protection, but the whole cluster is one party's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from flwr.app import RecordDict

from fedfm import errors
from fedfm.core.method import Method
from fedfm.core.update import Member, Tensors
from fedfm.errors import BadUpdate, ClientError, FedfmError
from fedfm.links.flower.ray_worker import records, tensors_of
from fedfm.links.inprocess import InProcess
from fedfm.links.link import Reply
from fedfm.links.tickets import in_order
from fedfm.secure.letters import MARK
from fedfm.store.clients import ClientStore
from fedfm.train.trainer import Trainer
from fedfm.wire import codec

if TYPE_CHECKING:
    from fedfm.links.flower.simulation import Simulation
    from fedfm.secure.secure import Secure

AHEAD = 4
"""Shares under way for each worker, so that none is idle while the server waits for the oldest."""


class RayLink:
    """Asks clients who are simulated on a Ray cluster.

    Args:
        method: the federated method.
        trainer: the server's; says which of a federation's trainers the clients have, and how many go together.
        store: clients' private state.
        simulation: the cluster.
        timeout_s: seconds a client may work on one task; 0 means no limit. With one, each works alone.
        secure: how uploads are summed: they are masked here, when they are back from their worker.
        on_step: called while waiting, and told of the steps of each client; may raise ``Stopped``.
        alike: further settings of a worker; those in the cluster have the same by the same recipe.
    """

    simulated: ClassVar[bool] = True

    def __init__(
        self,
        method: Method,
        trainer: Trainer,
        store: ClientStore,
        *,
        simulation: Simulation,
        timeout_s: float = 0.0,
        secure: Secure | None = None,
        on_step: Callable[[int], None] = lambda steps: None,
        **alike: Any,
    ) -> None:
        self.near = InProcess(method, trainer, store, secure=secure, on_step=on_step, **alike)
        self.method = method
        self.store = store
        self.simulation = simulation
        self.on_step = trainer.pulse = on_step
        self.judge = trainer is not simulation.federations[method.id].trainer
        self.group = 1 if timeout_s else trainer.group

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        """Replies in the order of ids; no more than ``AHEAD`` shares for each worker are in memory."""
        if phase in self.near.worker.protocol:
            yield from self.near.ask(phase, round, messages)
            return
        members = sorted(messages, key=lambda m: m.id)
        workers = self.simulation.workers(self.on_step)
        size = max(1, min(self.group, -(-len(members) // workers)))
        shares = iter([members[at : at + size] for at in range(0, len(members), size)])
        under_way: deque[tuple[list[Member], str]] = deque()
        while True:
            for share in islice(shares, AHEAD * workers - len(under_way)):
                content = self._share(phase, round, {member: messages[member] for member in share})
                under_way.append((share, self.simulation.send(content)))
            if not under_way:
                return
            share, number = under_way.popleft()
            content = self.simulation.reply(number, self.on_step)
            if "failed" in content:
                _raise(content["failed"], phase, round)
            for place, member in enumerate(share):
                yield self._reply(content, place, member, phase, round, messages[member])

    def close(self) -> None:
        """Nothing: clients keep what was admitted when it is admitted."""

    def _share(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> RecordDict:
        # Most methods send everybody the same tensors: those travel once.
        different = list({id(message): message for message in messages.values()}.values())
        plain = [{name: t for name, t in message.items() if not name.startswith(MARK)} for message in different]
        places = {id(message): place for place, message in enumerate(different)}
        task = {
            "method": self.method.id,
            "judge": self.judge,
            "phase": phase,
            "round": round,
            "clients": [member.id for member in messages],
            "down": [places[id(message)] for message in messages.values()],
        }
        down = {f"down.{place}": message for place, message in enumerate(plain)}
        own = {f"own.{place}": self.store.get(member.id) for place, member in enumerate(messages)}
        return records({"task": task}, down | {name: kept for name, kept in own.items() if kept})

    def _reply(self, content: Any, place: int, member: Member, phase: str, round: int, message: Tensors) -> Reply:
        done = content["done"]
        reason, seconds, steps, memory = (done[key][place] for key in ("reasons", "seconds", "steps", "memory"))
        self.on_step(steps)
        down = codec.tensors_size(message) if message else 0
        if (up := f"up.{place}") not in content:
            return Reply(member, None, reason, down, 0, seconds, steps, memory)
        data = content[up]["bytes"].data
        update = codec.decode(data, member.id)
        update = replace(update, tensors=in_order(update.tensors, content["orders"][up]))
        try:
            self.near.worker.met(phase, round, member, message)
            update = self.near.worker.hidden(phase, round, update)
        except BadUpdate as error:
            return Reply(member, None, str(error), down, 0, seconds, steps, memory)
        size = codec.size(update) if update.tensors or update.metrics else 0
        reply = Reply(member, update, "", down, size, seconds, steps, memory)
        if (kept := f"kept.{place}") not in content:
            return reply
        return replace(reply, accept=partial(self.store.put, member.id, round, tensors_of(content, kept)))


def _raise(failed: Any, phase: str, round: int) -> NoReturn:
    if "client" in failed:
        job = failed["job"] or None
        raise ClientError(failed["reason"], client=failed["client"], round=round, phase=phase, job=job)
    if failed["error"]:
        raise getattr(errors, failed["error"], FedfmError)(failed["reason"])
    raise RuntimeError(f"in a Ray worker: {failed['reason']}")
