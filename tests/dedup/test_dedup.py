"""Rows that several clients have: found without anybody's text being shown, and kept once."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDH, SECP256R1, derive_private_key
from datasets import Dataset

from fedfm.data import Iid, Natural, Population, federate
from fedfm.dedup import Deduplication, Exact, Near
from fedfm.dedup.deduplication import plain
from fedfm.dedup.oprf import ORDER, KeyServer, Question, hashed, point, times
from fedfm.dedup.protocol import Matcher, match
from fedfm.deploy.bundle import see_deployable
from fedfm.errors import BadUpdate, DataError, RecipeError
from fedfm.recipe import parse

WORDS = ("ward", "fever", "scan", "left", "knee", "the", "of", "patient", "mild", "acute", "pain", "after", "days")


def people(rows: Sequence[tuple[str, str]], kind: Deduplication | None = None, **settings: Any) -> Population:
    """Clients by name with their texts."""
    owner, text = zip(*rows, strict=True)
    data = Dataset.from_dict({"owner": owner, "text": text})
    return federate(data, Natural("owner"), deduplicate=kind, **settings)


def held(population: Population) -> dict[str, list[str]]:
    return {id: population.everything(id)["text"] for id in population.ids}


def sentences(count: int, seed: int = 0, words: int = 14) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, words)) + f" {i}" for i in range(count)]


# The function.


def test_the_group_is_p256() -> None:
    # (q - 1) G = -G, which has the same x-coordinate as G, and 2 G another one.
    numbers = derive_private_key(1, SECP256R1()).public_key().public_numbers()
    generator = numbers.x.to_bytes(32, "big")
    assert times(ORDER - 1, generator) == generator == times(1, generator)
    assert times(2, generator) != generator
    assert times(6, generator) == times(2, times(3, generator))


def test_tags_are_those_of_the_key_whatever_blinds_them() -> None:
    texts = [b"one", b"two", b"three"]
    tags = []
    for key in (5, 5, 7):
        keys, question = KeyServer(key), Question(texts)
        tags.append(question.tags(keys.answer("ann", question.blinded())))
    assert tags[0] == tags[1]
    assert len(set(tags[0].values())) == 3
    assert not set(tags[0].values()) & set(tags[2].values())
    # By hand: the hash of the text and of the point k H(x).
    shared = derive_private_key(5, SECP256R1()).exchange(ECDH(), point(hashed(b"two")))
    assert tags[0][b"two"] == hashlib.sha256((3).to_bytes(8, "little") + b"two" + shared).digest()[:16]


def test_a_point_off_the_curve_is_refused() -> None:
    off = next(c for c in (bytes([i]) * 32 for i in range(256)) if not on_curve(c))
    with pytest.raises(BadUpdate, match="a point that was sent is not on the curve"):
        KeyServer().answer("ann", [off])


def on_curve(coordinate: bytes) -> bool:
    try:
        point(coordinate)
    except BadUpdate:
        return False
    return True


def test_no_server_sees_what_a_dictionary_opens() -> None:
    texts = [b"HIV positive", b"HIV negative", b"flu"]
    rows = {"ann": [[t] for t in texts], "bob": [[texts[0]]]}
    keys, matcher = KeyServer(1234567), Matcher()
    match(rows, keys, matcher)
    tags = [tag for own in matcher.seen.values() for of in own for tag in of]
    blinded = [one for own in keys.seen.values() for one in own]

    def opened(guesses: Sequence[bytes]) -> bool:
        return any(g[: len(s)] == s for g in guesses for s in (*tags, *blinded))

    plainly = [h(t).digest() for t in texts for h in (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.blake2b)]
    assert not opened([*texts, *plainly, *map(hashed, texts)])

    def guessed(key: int) -> list[bytes]:
        question = Question(texts)
        return list(question.tags(KeyServer(key).answer("eve", question.blinded())).values())

    assert not opened(guessed(7654321))
    assert opened(guessed(1234567)), "who has the key can try texts"
    # The key server sees nothing twice, not even of a text that two clients have.
    assert len(blinded) == 4
    assert len(set(blinded)) == 4
    # The matcher sees that two rows match, and no more.
    assert matcher.seen["ann"][0] == matcher.seen["bob"][0]
    assert len(set(tags)) == 3


# What stays.


def test_of_equal_rows_one_stays_and_no_distinct_row_is_lost() -> None:
    draw = np.random.default_rng(0)
    rows = [(f"w{draw.integers(4)}", f"text {draw.integers(60)}") for _ in range(200)]
    before, after = held(people(rows)), held(people(rows, Exact()))
    kept = [t for own in after.values() for t in own]
    assert len(kept) == len(set(kept))
    assert set(kept) == {t for own in before.values() for t in own}
    assert all(set(after[id]) <= set(before[id]) for id in after)


def test_again_changes_nothing() -> None:
    rows = [(f"w{i % 3}", s) for i, s in enumerate(sentences(20) * 3)]
    for kind in (Exact(), Near()):
        once = held(people(rows, kind))
        twice = held(people([(id, t) for id, own in once.items() for t in own], kind, seed=9))
        assert twice == once


def test_no_client_keeps_more_than_its_share_by_its_name() -> None:
    rows = [(id, f"text {i}") for id in ("a", "b", "c") for i in range(300)]
    sizes = people(rows, Exact()).sizes()
    assert sizes.sum() == 300
    # 100 each, with a standard deviation of sqrt(300 * 2/9) = 8.2
    assert all(100 - 33 < n < 100 + 33 for n in sizes)


def test_the_rows_of_a_client_itself_are_compared_too() -> None:
    found = people([("a", "x y"), ("a", "X  y"), ("a", "z"), ("b", "q")], Exact())
    assert found.size("a") == 2


def test_case_spacing_and_width_do_not_count_but_classes_and_roles_do() -> None:
    assert plain({"text": "Ｔhe\tKnee "}) == plain({"text": "the knee"})
    said = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "no"}]
    assert plain({"messages": said}) == "user: go assistant: no"
    for kind in (Exact(), Near()):
        assert not set(kind.fingerprints("the knee hurts", "1")) & set(kind.fingerprints("the knee hurts", "2"))
        assert not set(kind.fingerprints("a", "11")) & set(kind.fingerprints("1a", "1"))
    data = Dataset.from_dict({"text": ["same"] * 4, "label": [0, 0, 1, 1], "owner": ["a", "b", "a", "b"]})
    assert federate(data, Natural("owner"), deduplicate=Exact()).sizes().sum() == 2


def test_near_duplicates_are_found_as_brute_force_finds_them() -> None:
    # Originals, copies with a letter changed, J about 0.9, and with 30, J below 0.4. Between them, where the curve is
    # steep, it is held against its formula below.
    kind, draw, texts = Near(), np.random.default_rng(1), []
    for text in sentences(60, seed=2, words=16):
        texts.append(text)
        for changes in (1, 30):
            letters = list(text)
            for at in draw.choice(len(letters), changes, replace=False):
                letters[at] = "#"
            texts.append("".join(letters))
    grams = [kind.shingles(t) for t in texts]
    prints = [set(kind.fingerprints(t, "")) for t in texts]
    wanted, found = set(), set()
    for i in range(len(texts)):
        for j in range(i):
            share = len(grams[i] & grams[j]) / len(grams[i] | grams[j])
            assert not 0.45 < share < 0.8
            if share >= 0.8:
                wanted.add((i, j))
            if prints[i] & prints[j]:
                found.add((i, j))
    assert len(wanted) >= 60
    assert len(found & wanted) / len(wanted) >= 0.95
    assert len(found & wanted) / len(found) >= 0.95


def test_the_chance_of_a_match_is_that_of_the_formula() -> None:
    kind = Near()
    assert kind.chance(1.0) == 1.0
    assert kind.chance(0.8) == pytest.approx(1 - (1 - 0.8**8) ** 16)
    # 10-grams in common: sets of 40 with 30 in common have J = 30 / 50 = 0.6.
    draw, hits = np.random.default_rng(3), 0
    alphabet = [chr(0x4E00 + i) for i in range(20000)]
    for _ in range(400):
        letters = draw.choice(len(alphabet), 50, replace=False)
        one, other = ("".join(alphabet[i] for i in part) for part in (letters[:40], letters[10:]))
        hits += bool(set(Near(shingle=1).fingerprints(one, "")) & set(Near(shingle=1).fingerprints(other, "")))
    expected = kind.chance(0.6)
    assert abs(hits / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_every_row_that_goes_matches_one_that_stays_and_no_two_that_stay_match() -> None:
    # b matches a and c, which do not match: either b stays alone, or a and c stay.
    for key in range(1, 9):
        rows = {"u": [[b"1", b"x"]], "v": [[b"1", b"2"]], "w": [[b"2", b"y"]]}
        out = match(rows, KeyServer(key), Matcher())
        gone = {client for client, places in out.items() if places}
        assert gone in ({"v"}, {"u", "w"})


# In a run.


def test_counts_are_told_and_clients_without_rows_are_left_out() -> None:
    rows = [("a", "one"), ("a", "two"), ("b", "one"), ("c", "three"), ("c", "two"), ("c", "one")]
    found = people(rows, Exact())
    summary = found.summary()
    assert sum(summary["duplicates"].values()) == 3
    assert {id: len(own) for id, own in held(people(rows)).items()}["b"] == 1
    for seed in range(20):
        other = people(rows, Exact(), seed=seed)
        if "b" not in other.ids:
            assert other.left_out == ["b"]
            assert other.summary()["duplicates"]["b"] == 1
            break
    else:
        pytest.fail("b never lost its only row")
    assert found.manifest()["deduplicate"] == {"kind": "exact"}
    assert json.loads(json.dumps(found.manifest())) == people(rows, Exact()).manifest()
    assert "duplicates" not in people(rows).summary()


def test_rows_of_those_who_left_count_for_nobody() -> None:
    rows = [("a", f"t{i}") for i in range(10)] + [("b", f"t{i}") for i in range(10)] + [("b", "own")]
    both = people(rows, Exact())
    assert 0 < both.size("b") < 11
    assert people(rows, Exact(), without=["a"]).size("b") == 11


def test_what_has_no_text_is_refused() -> None:
    data = Dataset.from_dict({"pixels": [[0.0]] * 4, "label": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=r"data\.deduplicate compares texts, but .* the columns label, pixels"):
        federate(data, Iid(2), deduplicate=Exact())
    with pytest.raises(RecipeError, match="Near bands must be at least 1, but is 0"):
        Near(bands=0)


def recipe(**data: Any) -> dict[str, Any]:
    part = {"source": "chatterbot", "partition": {"kind": "natural", "column": "topic"}, **data}
    return {"model": "m", "task": "chat", "data": part}


def test_a_recipe_names_it() -> None:
    assert parse(recipe()).deduplication() is None
    assert "deduplicate: null" in parse(recipe()).to_yaml()
    assert parse(recipe(deduplicate={"kind": "near", "bands": 4})).deduplication() == Near(bands=4)
    assert "permutations: 8" in parse(recipe(deduplicate="near")).to_yaml()
    with pytest.raises(RecipeError, match=r"data\.deduplicate has no kind 'exakt'\. Did you mean 'exact'"):
        parse(recipe(deduplicate="exakt"))
    with pytest.raises(RecipeError, match=r"data\.without must be empty in a deployed federation"):
        see_deployable(parse(recipe(without=["x"])))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(RecipeError, match=r'deduplicate: near needs datasketch: pip install "fedfm\[dedup\]"'):
        Near().fingerprints("text", "")
