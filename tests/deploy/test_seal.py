"""A signature covers everything, and is no other message's."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedfm.deploy.seal import Seal, statement
from fedfm.errors import BadUpdate

SETTINGS = {"run": "ab", "round": 3, "order": [1, 0], "seconds": 0.25, "ok": True}
CONTENT = hashlib.sha256(b"tensors").digest()


def seals() -> tuple[Seal, Seal]:
    """Two parties that know each other as ``left`` and ``right``."""
    one, two = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    return Seal(one, {"right": two.public_key()}), Seal(two, {"left": one.public_key(), "other": two.public_key()})


def test_what_is_signed_by_hand() -> None:
    parts = [b"fedfm seal 1", b"task", b'{"a":1}', CONTENT, b""]
    whole = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert statement("task", {"a": 1}, CONTENT) == hashlib.sha256(whole).digest()


def test_an_unchanged_message_passes() -> None:
    left, right = seals()
    right.verify("left", left.sign("task", SETTINGS, CONTENT, b"before"), "task", SETTINGS, CONTENT, b"before")
    # The order of settings means nothing.
    right.verify("left", left.sign("task", SETTINGS, CONTENT), "task", dict(reversed(SETTINGS.items())), CONTENT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"who": "other"}, "not that of 'other'"),
        ({"who": "nobody"}, "no key of 'nobody'"),
        ({"kind": "reply"}, "signature"),
        ({"settings": {**SETTINGS, "round": 4}}, "signature"),
        ({"settings": {**SETTINGS, "more": 1}}, "signature"),
        ({"settings": {**SETTINGS, "ok": 1}}, "signature"),
        ({"settings": {**SETTINGS, "seconds": float("nan")}}, "cannot be signed"),
        ({"settings": {**SETTINGS, "seconds": b"bytes"}}, "cannot be signed"),
        ({"content": hashlib.sha256(b"tensorz").digest()}, "signature"),
        ({"answered": b"another task"}, "signature"),
        ({"signature": b"\0" * 64}, "signature"),
        ({"signature": b"short"}, "signature"),
        ({"signature": b""}, "not signed"),
        ({"signature": "text"}, "not signed"),
    ],
)
def test_a_changed_message_is_refused(change: dict[str, Any], words: str) -> None:
    left, right = seals()
    given: dict[str, Any] = {
        "who": "left",
        "signature": left.sign("task", SETTINGS, CONTENT, b"before"),
        "kind": "task",
        "settings": SETTINGS,
        "content": CONTENT,
        "answered": b"before",
    }
    right.verify(**given)
    with pytest.raises(BadUpdate, match=words):
        right.verify(**given | change)


def test_parts_cannot_be_moved_into_one_another() -> None:
    assert statement("ab", {}, b"c") != statement("a", {}, b"bc")
    assert statement("a", {}, b"bc", b"d") != statement("a", {}, b"b", b"cd")
