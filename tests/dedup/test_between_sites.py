"""The comparison of rows between sites that share a key which the coordinator has not."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.dedup import Exact, Near
from fedfm.dedup.meeting import Meeting
from fedfm.dedup.party import DEAL, KEYS, LEAVE, TAGS, WIDTH, Party, introduced, tag
from fedfm.dedup.protocol import Matcher
from fedfm.deploy.seal import Seal
from fedfm.errors import BadUpdate
from fedfm.links.link import Reply
from fedfm.secure.agreement import KeyPair, seal
from fedfm.secure.letters import MARK, bytes_in, flat, numbers_in, of_bytes, of_numbers
from fedfm.wire.admit import Limits

RUN = "a" * 32
ROWS = {
    "ann": ["HIV positive", "flu", "flu", "knee"],
    "bob": ["knee", "HIV positive", "back"],
    "cid": ["back", "toe"],
}
Forge = Callable[[str, str, dict[str, torch.Tensor]], Tensors]


class People:
    """Who is there, with as many training rows as they have rows."""

    def __init__(self, rows: Mapping[str, Sequence[str]]) -> None:
        self._rows = rows
        self.ids = sorted(rows)

    def member(self, id: str) -> Member:
        return Member(id, len(self._rows[id]))

    def rows(self, id: str, split: str) -> Any:
        raise AssertionError("no rows here")

    def pooled(self) -> Any:
        raise AssertionError("no rows here")


class Sites:
    """Sites in this process as a link reaches them.

    Args:
        rows: what each has.
        forge: what arrives instead of what a site sent: of task and site.
        alter: what a site is told instead.
        gone: by task, who does not answer.
    """

    simulated = False

    def __init__(
        self,
        rows: Mapping[str, Sequence[str]] = ROWS,
        forge: Forge = lambda phase, site, tensors: tensors,
        alter: Forge = lambda phase, site, tensors: tensors,
        gone: Mapping[str, Sequence[str]] = {},
    ) -> None:
        own = {name: Ed25519PrivateKey.generate() for name in rows}
        known = {name: key.public_key() for name, key in own.items()}
        self.own, self.rows, self.forge, self.alter, self.gone = own, rows, forge, alter, gone
        self.seals = {n: Seal(k, {m: p for m, p in known.items() if m != n}) for n, k in own.items()}
        self.coordinator = Seal(Ed25519PrivateKey.generate(), known)
        self.parties: dict[str, Party] = {}
        self.seen: list[tuple[str, str, Tensors]] = []
        self.told: list[tuple[str, str, Tensors]] = []
        self.left: dict[str, list[int]] = {}

    def ask(self, phase: str, round: int, messages: Mapping[Member, Tensors]) -> Iterator[Reply]:
        for member in sorted(messages, key=lambda m: m.id):
            message = self.alter(phase, member.id, dict(messages[member]))
            self.told.append((phase, member.id, message))
            if member.id in self.gone.get(phase, ()):
                yield Reply(member, None, "gone")
                continue
            try:
                answer = self.forge(phase, member.id, self._answer(phase, member.id, message))
            except BadUpdate as error:
                yield Reply(member, None, str(error))
                continue
            self.seen.append((phase, member.id, answer))
            yield Reply(member, Update(answer, 0.0, {}, Kind.KNOWLEDGE, member.id))

    def _answer(self, phase: str, site: str, message: Tensors) -> dict[str, torch.Tensor]:
        if phase == KEYS:
            self.parties[site] = Party(site, RUN, self.seals[site])
            return self.parties[site].keys()
        if phase == DEAL:
            return self.parties[site].deal(message)
        if phase == TAGS:
            return self.parties[site].tags(message, [Exact().fingerprints(text, "") for text in self.rows[site]])
        self.left[site] = numbers_in(message, "left-out")
        return of_numbers("examples", [len(self.rows[site]) - len(self.left[site])])

    def close(self) -> None:
        pass


def met(sites: Sites, most: int = 100) -> tuple[dict[str, list[int]], Meeting]:
    meeting = Meeting(sites, People(sites.rows), RUN, sites.coordinator, Limits())
    out = meeting.compared(Exact(), most)
    meeting.told(out)
    return out, meeting


def stays(sites: Sites, out: Mapping[str, Sequence[int]]) -> list[str]:
    return sorted(t for site in out for at, t in enumerate(sites.rows[site]) if at not in out[site])


def key_of(sites: Sites) -> bytes:
    [key] = [party._dealt for party in sites.parties.values() if party._dealt]
    return key


# What stays.


def test_of_equal_rows_one_stays_in_the_whole_federation() -> None:
    sites = Sites()
    out, meeting = met(sites)
    assert stays(sites, out) == ["HIV positive", "back", "flu", "knee", "toe"]
    assert sites.left == out
    assert 2 in out["ann"], "of the rows of one site, the first stays"
    assert not meeting.dropped


def test_the_rule_is_that_of_a_simulation() -> None:
    sites = Sites()
    out, _ = met(sites)
    key, matcher = key_of(sites), Matcher()
    for site, texts in ROWS.items():
        # By hand: HMAC-SHA256 of the fingerprint, its first 16 bytes.
        matcher.receive(site, [[hmac.new(key, f"0:{t}".encode(), hashlib.sha256).digest()[:16]] for t in texts])
    assert matcher.left_out() == out


def test_near_rows_have_a_tag_for_each_band() -> None:
    kind = Near(bands=4, permutations=2)
    party = Party("ann", RUN, Sites().seals["ann"])
    alone = introduced([("ann", party._pair.public, b"s" * 64)])
    party.deal(alone)
    rows = [kind.fingerprints(text, "") for text in ("the knee hurts today", "the knee hurts today", "else")]
    tags = bytes_in(party.tags(alone, rows), "tags", 3, kind.count, WIDTH)
    assert np.array_equal(tags[0], tags[1])
    assert not {t.tobytes() for t in tags[0]} & {t.tobytes() for t in tags[2]}
    assert kind.count == len(kind.fingerprints("x", "")) == 4
    assert Exact().count == len(Exact().fingerprints("x", "")) == 1


# What the coordinator sees.


def test_no_text_and_nothing_that_a_dictionary_opens_leaves_a_site() -> None:
    sites = Sites()
    met(sites)
    texts = sorted({text for own in ROWS.values() for text in own})
    plain = [one for text in texts for one in (text.encode(), *Exact().fingerprints(text, ""))]
    hashes = [h(one).digest() for one in plain for h in (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.blake2b)]
    whole = b"".join(t.numpy().tobytes() for _, _, answer in sites.seen for t in answer.values())
    told = b"".join(t.numpy().tobytes() for _, _, message in sites.told for t in message.values())
    assert not [one for one in [*plain, *hashes] if one[:16] in whole or one[:16] in told]
    key = key_of(sites)
    assert key not in whole + told
    # Who has the key can try texts: a site that works with the coordinator.
    assert tag(key, Exact().fingerprints("HIV positive", "")[0]) in whole
    # Two runs have nothing in common.
    again = Sites()
    met(again)
    first, second = ({a[MARK + "tags"].numpy().tobytes() for p, _, a in s.seen if p == TAGS} for s in (sites, again))
    assert not first & second


def test_a_coordinator_that_passes_its_own_key_on_gets_none() -> None:
    eve = KeyPair()

    def swapped(phase: str, site: str, message: dict[str, torch.Tensor]) -> Tensors:
        if phase == DEAL:
            keys = message[MARK + "keys"].clone()
            keys[-1] = torch.from_numpy(flat(eve.public))
            message[MARK + "keys"] = keys
        return message

    sites = Sites(alter=swapped)
    out, meeting = met(sites)
    assert not out
    # Each in turn is asked to deal; the last finds its own key replaced.
    assert "its signature is not that of 'cid'" in meeting.dropped["ann"]
    assert "its signature is not that of 'cid'" in meeting.dropped["bob"]
    assert "passes another key on than this site's" in meeting.dropped["cid"]
    assert not [phase for phase, _, _ in sites.seen if phase in (DEAL, TAGS)]


def test_a_coordinator_that_deals_itself_gets_no_tags() -> None:
    eve, key = KeyPair(), b"k" * 32

    def dealt(phase: str, site: str, message: dict[str, torch.Tensor]) -> Tensors:
        if phase != TAGS or site == "ann":
            return message
        public = sites.parties[site]._pair.public
        sealed = seal(eve.agreed(public, f"dedup {RUN}"), key)
        return {**message, MARK + "keys": torch.from_numpy(flat(eve.public))[None], **of_bytes("sealed", flat(sealed))}

    sites = Sites(alter=dealt)
    _, meeting = met(sites)
    assert all("its signature is not that of 'ann'" in meeting.dropped[site] for site in ("bob", "cid"))
    assert [site for phase, site, _ in sites.seen if phase == TAGS] == ["ann"]


def test_a_site_shares_no_key_with_a_stranger() -> None:
    sites = Sites()
    sites.seals["ann"] = Seal(sites.own["ann"], {"bob": sites.own["bob"].public_key()})
    out, meeting = met(sites)
    assert set(out) == {"bob", "cid"}
    assert meeting.dropped["ann"] == (
        "it has no key of the site 'cid', and shares none with strangers. Put cid.pub into its folder peers, or leave "
        "that site out"
    )


def test_a_signature_of_another_run_or_site_is_none() -> None:
    sites = Sites()
    party = Party("ann", RUN, sites.seals["ann"])
    own = ("ann", party._pair.public, b"s" * 64)
    for run, name in (("b" * 32, "bob"), (RUN, "cid")):
        other = Party(name, run, sites.seals["bob"]).keys()  # What bob signs there is passed on as bob's here.
        key, signature = (bytes_in(other, of, 1, -1).tobytes() for of in ("keys", "signatures"))
        with pytest.raises(BadUpdate, match="its signature is not that of 'bob'"):
            party.deal(introduced([own, ("bob", key, signature)]))
    again = Party("bob", RUN, sites.seals["bob"]).keys()
    key, signature = (bytes_in(again, of, 1, -1).tobytes() for of in ("keys", "signatures"))
    assert party.deal(introduced([own, ("bob", key, signature)]))


# Sites that lie or drop out.


def test_a_forged_key_is_named_by_the_coordinator() -> None:
    def forge(phase: str, site: str, tensors: dict[str, torch.Tensor]) -> Tensors:
        if phase == KEYS and site == "bob":
            tensors[MARK + "keys"] = torch.from_numpy(flat(KeyPair().public))[None]
        return tensors

    sites = Sites(forge=forge)
    out, meeting = met(sites)
    assert list(meeting.dropped) == ["bob"]
    assert "its signature is not that of 'bob'" in meeting.dropped["bob"]
    assert stays(sites, out) == ["HIV positive", "back", "flu", "knee", "toe"]


@pytest.mark.parametrize(
    ("phase", "name", "value", "words"),
    [
        (TAGS, "tags", torch.zeros(3, 1, 15, dtype=torch.uint8), r"'tags' must be bytes \[-1, 1, 16\], but is"),
        (TAGS, "tags", torch.zeros(3, 2, 16, dtype=torch.uint8), r"'tags' must be bytes \[-1, 1, 16\]"),
        (TAGS, "tags", torch.zeros(101, 1, 16, dtype=torch.uint8), "hands in 101 rows, more than the 100 allowed"),
        (TAGS, "tags", torch.zeros(3, 1, 16), r"'tags' must be bytes"),
        (KEYS, "keys", torch.zeros(2, 32, dtype=torch.uint8), r"'keys' must be bytes \[1, 32\]"),
        (LEAVE, "examples", torch.tensor([4]), "it says that 4 of its 3 training rows are left"),
        (LEAVE, "examples", torch.tensor([1, 1]), "cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_is_dropped_and_named(phase: str, name: str, value: torch.Tensor, words: str) -> None:
    def forge(at: str, site: str, tensors: dict[str, torch.Tensor]) -> Tensors:
        return {**tensors, MARK + name: value} if (at, site) == (phase, "bob") else tensors

    _, meeting = met(Sites(forge=forge))
    assert list(meeting.dropped) == ["bob"]
    with pytest.raises(BadUpdate, match=words):
        raise BadUpdate(meeting.dropped["bob"])


@pytest.mark.parametrize("phase", [KEYS, DEAL, TAGS])
def test_who_drops_out_before_the_match_is_left_out_of_it(phase: str) -> None:
    sites = Sites(gone={phase: ["ann"]})
    out, meeting = met(sites)
    assert meeting.dropped == {"ann": "gone"}
    assert stays(sites, out) == ["HIV positive", "back", "knee", "toe"]
    dealers = [site for at, site, _ in sites.told if at == DEAL]
    assert dealers == {KEYS: ["bob"], DEAL: ["ann", "bob"], TAGS: ["ann"]}[phase]


def test_a_site_that_is_told_that_it_dealt_and_did_not_says_so() -> None:
    party = Party("ann", RUN, Sites().seals["ann"])
    with pytest.raises(BadUpdate, match="says that this site dealt the key, and it did not"):
        party.tags(introduced([("ann", party._pair.public, b"s" * 64)]), [[b"x"]])


def test_a_site_alone_finds_its_own() -> None:
    sites = Sites({"ann": ["a", "b", "a"]})
    out, _ = met(sites)
    assert out == {"ann": [2]}
