"""The coordinator's half of the comparison in a deployed federation: it passes keys on, matches tags, and says which
rows are left out.

Who does not answer, or not as it should, takes no part in the run: a site whose rows were not compared would bring back
what the others left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfm.core.plan import Members
from fedfm.core.update import Kind, Tensors
from fedfm.dedup.deduplication import Deduplication
from fedfm.dedup.party import (
    DEAL,
    KEYS,
    LEAVE,
    SEALED,
    SIGNATURE,
    STATEMENT,
    TAGS,
    WIDTH,
    Signer,
    about,
    introduced,
)
from fedfm.dedup.protocol import Matcher
from fedfm.errors import BadUpdate
from fedfm.links.link import Link
from fedfm.secure.agreement import KEY
from fedfm.secure.letters import bytes_in, numbers_in, of_bytes, of_numbers
from fedfm.wire.admit import BROKEN, Limits, admit, brief

Introduced = tuple[str, bytes, bytes]
"""A site's name, its public key, and its signature."""


class Meeting:
    """The sites of a run, asked over a link before its first round.

    Args:
        link: reaches them.
        members: who is there.
        run: name of the run.
        signer: knows the sites' signing keys.
        limits: bounds on what a site may send.
    """

    def __init__(self, link: Link, members: Members, run: str, signer: Signer, limits: Limits) -> None:
        self.link = link
        self.members = members
        self.run = run
        self.signer = signer
        self.limits = limits
        self.dropped: dict[str, str] = {}
        """Sites that take no part, and why."""

    def compared(self, kind: Deduplication, most_rows: int) -> dict[str, list[int]]:
        """The places of the rows that each site is to leave out; nothing of sites that were dropped.

        Args:
            kind: which rows match.
            most_rows: that one site may hand in: with each row, a text can be tried.
        """
        matcher = Matcher()
        sites = self._introduced()
        dealer, sealed = self._dealt(sites)
        if dealer is None:
            return {}

        def take(site: str, answer: Tensors) -> None:
            tags = bytes_in(answer, "tags", -1, kind.count, WIDTH)
            if len(tags) > most_rows:
                raise BadUpdate(f"it hands in {len(tags)} rows, more than the {most_rows} allowed")
            matcher.receive(site, [[one.tobytes() for one in row] for row in tags])

        by = introduced([dealer])
        messages = {dealer[0]: by} | {site: by | of_bytes("sealed", row) for site, row in sealed.items()}
        self._ask(TAGS, messages, take)
        return matcher.left_out()

    def told(self, left_out: Mapping[str, list[int]]) -> dict[str, int]:
        """Tell each site which rows to leave out; the training rows that each has left.

        Told once more, a site answers the same, so that a run can go on after a crash.
        """
        left: dict[str, int] = {}

        def take(site: str, answer: Tensors) -> None:
            [count] = numbers_in(answer, "examples")
            if count > (before := self.members.member(site).examples):
                raise BadUpdate(f"it says that {count} of its {before} training rows are left")
            left[site] = count

        there = set(self.members.ids)
        messages = {site: of_numbers("left-out", places) for site, places in left_out.items() if site in there}
        self._ask(LEAVE, messages, take)
        return left

    def _introduced(self) -> list[Introduced]:
        """The sites with public keys that they signed."""
        found: list[Introduced] = []

        def take(site: str, answer: Tensors) -> None:
            key = bytes_in(answer, "keys", 1, KEY).tobytes()
            signature = bytes_in(answer, "signatures", 1, SIGNATURE).tobytes()
            self.signer.verify(site, signature, STATEMENT, about(self.run, site), key)
            found.append((site, key, signature))

        self._ask(KEYS, {site: {} for site in self.members.ids}, take)
        return found

    def _dealt(self, sites: list[Introduced]) -> tuple[Introduced | None, dict[str, NDArray[np.uint8]]]:
        """Who dealt the key, and what it sealed for each other site; the next one is asked when one does not deal."""
        for dealer in sites:
            present = [one for one in sites if one[0] not in self.dropped]
            others = [name for name, *_ in present if name != dealer[0]]
            dealt: list[NDArray[np.uint8]] = []

            def take(site: str, answer: Tensors, count: int = len(others), dealt: list[Any] = dealt) -> None:
                dealt.extend(bytes_in(answer, "sealed", count, SEALED))

            self._ask(DEAL, {dealer[0]: introduced(present)}, take)
            if dealer[0] not in self.dropped:
                return dealer, dict(zip(others, dealt, strict=True))
        return None, {}

    def _ask(self, phase: str, messages: Mapping[str, Tensors], take: Callable[[str, Tensors], None]) -> None:
        """Put a question; whose answer cannot be used is dropped."""
        asked = {self.members.member(site): message for site, message in messages.items()}
        for reply in self.link.ask(phase, 0, asked) if asked else ():
            try:
                if reply.update is None:
                    raise BadUpdate(reply.reason)
                admit(reply.update, Kind.KNOWLEDGE, None, self.limits)
                take(reply.member.id, reply.update.tensors)
            except (BadUpdate, *BROKEN) as error:
                why = error if isinstance(error, BadUpdate) else f"it cannot be read: {error}"
                self.dropped[reply.member.id] = brief(str(why))
            else:
                reply.accept()
