"""The clock of asynchronous schedules: who is at work, from which version of the model, and who finishes next.

In a simulation time is simulated: a task takes as long as its client is slow, whatever this machine needs for it. All
durations and draws are functions of names (:mod:`fedfm.core.seeds`), so the order of events is that of the run's seed.
In a deployed federation clients take the time that they take, and the order is that in which uploads arrive.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fedfm.core import seeds
from fedfm.core.method import Method, State
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import Incompatible, NoUpdates, RecipeError, require
from fedfm.schedule.schedule import Memory, Schedule
from fedfm.schedule.staleness import Discount, constant, hinge, polynomial

if TYPE_CHECKING:
    from fedfm.robust.screen import Screen
    from fedfm.server import RoundServer


class Task(NamedTuple):
    """Client work under way.

    Args:
        finish: when it is done, in simulated time.
        client: id of the client.
        version: number of server updates in the model from which it started.
    """

    finish: float
    client: str
    version: int


class Arrival(NamedTuple):
    """An upload, and what the server knows of its start.

    Args:
        update: what the client sent.
        member: who it is.
        start: the message from which it started.
        staleness: $u$, server updates since then.
    """

    update: Update
    member: Member
    start: Tensors
    staleness: int


class Flights:
    """Tasks in flight. Lives for one server update; its memory goes on.

    Args:
        seed: the run's seed.
        ids: all clients, sorted.
        concurrency: tasks in flight, as long as there are clients for them.
        memory: what :meth:`memory` gave before; empty at the beginning.
    """

    def __init__(self, seed: int, ids: Sequence[str], concurrency: int, memory: Memory) -> None:
        self._seed, self._ids, self._concurrency = seed, ids, concurrency
        self.now: float = memory.get("now", 0.0)
        self.version: int = memory.get("version", 0)
        self._started: int = memory.get("started", 0)
        self.flying = [Task(*task) for task in memory.get("flying", ())]
        self._asked: set[str] = set()  # at this version, of which nobody was asked before

    def memory(self) -> dict[str, Any]:
        """What the clock of the next version needs to go on."""
        return {
            "now": self.now,
            "version": self.version + 1,
            "started": self._started,
            "flying": tuple(tuple(task) for task in self.flying),
        }

    def land(self, client: str) -> Task:
        """The task of a client, which is in flight no more."""
        task = next(task for task in self.flying if task.client == client)
        self.flying.remove(task)
        return task

    def start(self, duration: Callable[[str, int], float] = lambda client, version: 0.0) -> list[Task]:
        """Start tasks until enough are in flight; those that were started.

        Clients are drawn uniformly among those that are neither in flight nor were asked at this version: at the same
        version a client would draw the same numbers and send the same once more.
        """
        before = len(self.flying)
        busy = self._asked | {task.client for task in self.flying}
        free = [id for id in self._ids if id not in busy]
        while free and len(self.flying) < self._concurrency:
            client = free.pop(seeds.derive(self._seed, "schedule", "next", self._started) % len(free))
            self.flying.append(Task(self.now + duration(client, self.version), client, self.version))
            self._asked.add(client)
            self._started += 1
        return self.flying[before:]


class Clock(Flights):
    """Tasks in flight at a moment of simulated time. Arguments as of :class:`Flights`.

    Args:
        duration: simulated time that a client (id) takes for its task at a version.
    """

    def __init__(
        self,
        seed: int,
        ids: Sequence[str],
        concurrency: int,
        duration: Callable[[str, int], float],
        memory: Memory,
    ) -> None:
        super().__init__(seed, ids, concurrency, memory)
        self._duration = duration

    def finished(self, count: int) -> list[Task]:
        """The next tasks to finish, ``count`` of them or as many as there are; of equal times, by client id."""
        done: list[Task] = []
        while len(done) < count:
            self.start(self._duration)
            if not self.flying:
                break
            first = min(self.flying)
            self.flying.remove(first)
            self.now = first.finish
            done.append(first)
        return done


@dataclass(frozen=True, kw_only=True)
class Asynchronous(Schedule):
    """What asynchronous schedules have in common. One step is one server update.

    A client's work is done when it finishes, with the message of the version at which it started and the random draws
    of the round after that version. When nobody is in flight and everybody was asked at this version, the server does
    not wait for more.

    Args:
        concurrency: tasks in flight; 0 means as many as the sampler draws, which decides nothing else here.
        discount: $s(u)$ by its name: ``constant``, ``polynomial`` or ``hinge``.
        power: $c$ of the polynomial discount.
        slope: $a$ of the hinge.
        grace: $b$ of the hinge, in versions.
        max_staleness: uploads with more versions than this between start and arrival are dropped; -1 drops none.
        sigma: speeds of devices are log-normal, $\\ln v \\sim N(0, \\sigma^2)$, drawn once for each client by its name;
            ``speed`` in a client's profile takes its place. A task takes $1 / v$ units of time.
        jitter: standard deviation of the logarithm of what each single task adds to that as a factor.
    """

    needs: ClassVar[Traits] = frozenset(
        {Trait.LINEAR, Trait.VISIBLE, Trait.ALIGNED, Trait.STEADY, Trait.ONE_ASK, Trait.FORGETFUL}
    )
    instead: ClassVar[Mapping[Trait, str]] = dict.fromkeys(needs, "Use a synchronous method, such as fedavg, instead.")

    concurrency: int = 0
    discount: Discount = "polynomial"
    power: float = 0.5
    slope: float = 10.0
    grace: int = 4
    max_staleness: int = -1
    sigma: float = 1.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        require(self, "concurrency", self.concurrency >= 0, "at least 1, or 0 for as many as the sampler draws")
        known = ("constant", "polynomial", "hinge")
        require(self, "discount", self.discount in known, f"one of {', '.join(known)}")
        for name in ("power", "slope", "sigma", "jitter"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        require(self, "grace", self.grace >= 0, "at least 0")
        require(self, "max_staleness", self.max_staleness >= -1, "at least 0, or -1 to drop none")

    @property
    @abstractmethod
    def wanted(self) -> int:
        """Uploads for one server update."""

    @abstractmethod
    def use(self, method: Method, server: RoundServer, state: State, arrivals: Sequence[Arrival]) -> State:
        """The state after the server update (pure)."""

    def weight(self, staleness: int) -> float:
        """$s(u)$."""
        if self.discount == "constant":
            return constant(staleness)
        if self.discount == "polynomial":
            return polynomial(staleness, self.power)
        return hinge(staleness, self.slope, self.grace)

    def duration(self, seed: int, member: Member, version: int) -> float:
        """Simulated time that a client takes for its task at a version.

        Raises:
            RecipeError: its profile has a speed that is none.
        """
        drawn = seeds.numpy_generator(seed, "device", member.id).lognormal(0.0, self.sigma)
        speed = float(member.profile.get("speed", drawn))
        if not 0 < speed < math.inf:
            raise RecipeError(f"profiles.speed must be above 0 and finite, but is {speed} for client {member.id!r}.")
        wobble = seeds.numpy_generator(seed, "device", member.id, version).lognormal(0.0, self.jitter)
        return float(wobble) / speed

    def advance(self, method: Method, server: RoundServer, state: State, memory: Memory) -> tuple[State, Memory]:
        seed, simulated = server.space.seed, server.link.simulated
        given = seed, server.ids, self.concurrency or len(server.members)
        clock = Clock(*given, lambda id, version: self.duration(seed, server.member(id), version), memory)
        flights: Flights = clock if simulated else Flights(*given, memory)
        # A client may finish many versions after its start, also in a resumed run, so its message is made of the state
        # as it was.
        states = {
            **memory.get("states", {}),
            str(flights.version): {f.name: getattr(state, f.name) for f in fields(state)},
        }
        arrivals: list[Arrival] = []
        if simulated:
            while missing := self.wanted - len(arrivals):
                if not (done := clock.finished(missing)):
                    break
                arrivals += self._work(
                    method, server, self._fresh(server, done, clock.version), clock.version, states, state
                )
        else:
            arrivals += self._landed(method, server, flights, states, state)
        if not arrivals:
            raise NoUpdates("everybody was asked, and nobody's update could be used")
        # In the order of clients, so that rounding does not depend on that of the clock.
        arrivals.sort(key=lambda arrival: (arrival.member.id, arrival.staleness))
        after = self.use(method, server, state, arrivals)
        server.notes["version"] = flights.version + 1
        if simulated:
            server.notes["simulated_time"] = clock.now
        server.notes["staleness"] = [{"client": a.member.id, "staleness": a.staleness} for a in arrivals]
        needed = {str(task.version) for task in flights.flying}
        return after, {**flights.memory(), "states": {v: s for v, s in states.items() if v in needed}}

    def _fresh(self, server: RoundServer, tasks: Sequence[Task], now: int) -> Iterator[Task]:
        """The tasks that are not too old; the others are dropped and named."""
        for task in tasks:
            late = now - task.version
            if 0 <= self.max_staleness < late:
                reason = f"stale: {late} versions are more than the {self.max_staleness} allowed"
                server.dropped.append({"client": task.client, "reason": reason})
            else:
                yield task

    def _work(
        self,
        method: Method,
        server: RoundServer,
        tasks: Iterator[Task],
        now: int,
        states: Mapping[str, Mapping[str, Any]],
        state: State,
    ) -> Iterator[Arrival]:
        """The uploads of finished tasks. Those of one version are asked together, since they can be trained so."""
        together: dict[int, list[Member]] = defaultdict(list)
        for task in tasks:
            together[task.version].append(server.member(task.client))
        for version, members in sorted(together.items()):
            then = type(state)(**states[str(version)])
            messages = {member: method.message(then, member) for member in members}
            by_id = {member.id: member for member in members}
            for update in server.ask("local", messages, round=version + 1):
                member = by_id[update.member]
                yield Arrival(update, member, messages[member], now - version)

    def _landed(
        self,
        method: Method,
        server: RoundServer,
        flights: Flights,
        states: Mapping[str, Mapping[str, Any]],
        state: State,
    ) -> Iterator[Arrival]:
        """The uploads of clients that work in their own time, as they arrive."""

        def message(member: Member, version: int) -> Tensors:
            return method.message(type(state)(**states[str(version)]), member)

        def begin(tasks: Sequence[Task]) -> None:
            for version in sorted({task.version for task in tasks}):
                members = [server.member(task.client) for task in tasks if task.version == version]
                # One set of tensors for all, where the method sends all the same.
                server.begin("local", {member: message(member, version) for member in members}, version + 1)

        # In a run that goes on after a loss nobody is at work: what was in flight is begun again.
        begin([task for task in flights.flying if task.client not in server.in_flight])
        count = 0
        while count < self.wanted:
            begin(flights.start())
            if not flights.flying:
                return
            versions = {task.client: task.version for task in flights.flying}
            member, update = server.arrived("local", lambda member: message(member, versions[member.id]))  # noqa: B023
            task = flights.land(member.id)
            if update is None:
                continue
            for fresh in self._fresh(server, [task], flights.version):
                yield Arrival(update, member, message(member, fresh.version), flights.version - fresh.version)
                count += 1

    def fits(self, method: Method, screens: Sequence[Screen]) -> None:
        me, name = type(self).__name__, type(method).__name__
        if method.kind("local") is not Kind.DELTA:
            raise Incompatible(
                f"{me} weighs changes of weights, but {name} sends {method.kind('local')}. Leave {me} out."
            )
        if type(method).round is not Method.round:
            raise Incompatible(f"{me} asks clients in its own order, but {name} has rounds of its own. Leave {me} out.")
        if screens:
            who = type(screens[0]).__name__
            raise Incompatible(f"{who} compares the uploads of one round, which {me} does not have. Leave {who} out.")
