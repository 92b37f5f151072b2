"""Who is scored, with which tensors, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from fedfm.attack.attack import Probed
from fedfm.core.method import State
from fedfm.core.plan import Members
from fedfm.core.update import Member, Tensors
from fedfm.evaluate.assessment import Assessment, assess
from fedfm.links.link import Link
from fedfm.sample.uniform import Uniform
from fedfm.store.clients import ClientStore

if TYPE_CHECKING:
    from fedfm.federation import Federation


class Scoring:
    """The scores of a federation's clients; what :class:`Federation` offers of them is told there.

    Args:
        federation: whose clients.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    def assess(self, state: State, phase: str, store: ClientStore | None) -> Assessment | None:
        """The scores of every client, also of those that a method pools."""
        one = self.federation
        members = one.base_plan.members
        link = one.reach(store or ClientStore(), one.judge)
        return self._scores(link, state, phase, members, sorted(members.ids))

    def validate(self, link: Link, state: State) -> Assessment | None:
        """The scores of the clients that are scored during training."""
        return self._scores(link, state, "validate", self.federation.plan.members, self.panel)

    def probe(self, state: State, phase: str, *, store: ClientStore | None, link: Link | None) -> float | None:
        """The share of honest clients' held-out rows that get the answer which the attacker wants."""
        one = self.federation
        attack = one.attack
        if attack is None or not attack.threat.targeted:
            return None
        test = phase == "test"
        members, among = (one.base_plan.members, one.members.ids) if test else (one.plan.members, self.panel)
        ids = sorted(set(among) - set(attack.hostile))
        link = link or one.reach(store or ClientStore(), one.judge if test else one.trainer)
        replies = link.ask(f"probe-{phase}", 0, self._messages(state, map(members.member, ids)))
        found = assess(Probed(one.task), (r.update for r in replies if r.update is not None))
        return found.pooled["attack_success"] if found else None

    @cached_property
    def panel(self) -> list[str]:
        """The clients that are scored during training."""
        one = self.federation
        if len(one.ids) <= one.evaluation.max_clients:
            return list(one.ids)
        return Uniform(count=one.evaluation.max_clients).sample(one.ids, 0, one.seed)

    def _scores(self, link: Link, state: State, phase: str, members: Members, ids: Sequence[str]) -> Assessment | None:
        replies = link.ask(phase, 0, self._messages(state, map(members.member, ids)))
        return assess(self.federation.task, (r.update for r in replies if r.update is not None))

    def _messages(self, state: State, members: Iterable[Member]) -> dict[Member, Tensors]:
        """What clients have of the server's state, to be scored with."""
        one = self.federation
        messages = {member: one.method.message(state, member) for member in members}
        return one.marking.dispatched(messages, 0) if one.marking else messages
