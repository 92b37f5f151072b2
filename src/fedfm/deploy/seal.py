"""Signatures over what travels between a coordinator and its sites.

Transport security says which machine sent a message; a signature of fedfm says for which run, round and task it was
made, and that nothing in it was changed. Ed25519 (RFC 8032) signs the SHA-256 of

    ``fedfm seal 1`` | kind | settings | SHA-256 of the bytes | the signature that is answered

where each part stands behind its length in 8 bytes, and settings are JSON with sorted keys. A task bears the run, a
number that only grows, the recipe, the client, round and ticket; a reply covers the signature of its task, so it can
be no other task's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedfm.errors import BadUpdate

LABEL = b"fedfm seal 1"
COORDINATOR = "the coordinator"
"""Name under which a site knows its coordinator."""


def statement(kind: str, settings: Mapping[str, Any], content: bytes, answered: bytes = b"") -> bytes:
    """What is signed, 32 bytes.

    Args:
        kind: such as ``task`` or ``reply``; a signature of one kind is none of another.
        settings: texts, finite numbers and lists of them.
        content: :func:`fedfm.links.tickets.digest` of the bytes that travel beside the settings.
        answered: the signature of the message that is answered.

    Raises:
        BadUpdate: settings of other types.
    """
    try:
        text = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadUpdate(f"its settings cannot be signed: {error}") from error
    whole = hashlib.sha256()
    for part in (LABEL, kind.encode(), text, content, answered):
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()


@dataclass(frozen=True)
class Seal:
    """One party's key, and the public keys of those it deals with.

    Args:
        own: signs.
        others: by name.
    """

    own: Ed25519PrivateKey
    others: Mapping[str, Ed25519PublicKey]

    def sign(self, kind: str, settings: Mapping[str, Any], content: bytes, answered: bytes = b"") -> bytes:
        """The signature, 64 bytes; arguments as of :func:`statement`."""
        return self.own.sign(statement(kind, settings, content, answered))

    def verify(
        self, who: str, signature: object, kind: str, settings: Mapping[str, Any], content: bytes, answered: bytes = b""
    ) -> None:
        """See that a message is from ``who`` and as it was signed.

        Raises:
            BadUpdate: it is not, or there is no key of that name.
        """
        if who not in self.others:
            raise BadUpdate(f"there is no key of {who!r}")
        if not isinstance(signature, bytes) or not signature:
            raise BadUpdate("it is not signed")
        try:
            self.others[who].verify(signature, statement(kind, settings, content, answered))
        except InvalidSignature:
            raise BadUpdate(f"its signature is not that of {who!r} over this message of this run") from None
