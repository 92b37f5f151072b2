"""A site's half of the comparison in a deployed federation, where one coordinator matches and nobody is a key server.

The sites share a key that the coordinator has not: one of them, the dealer, draws it and seals it for each of the
others (X25519, HKDF, ChaCha20-Poly1305). Public keys go through the coordinator, signed by their sites for this run; a
site believes those alone whose signing keys it was given beforehand, so a coordinator that passes on keys of its own
gets no key, and neither does a site that it invents. A row's tags are HMAC-SHA256 of its fingerprints under that key.

================  ======================================================  =========================================
task              down                                                    up
================  ======================================================  =========================================
``dedup/keys``    nothing                                                 ``keys``, ``signatures``: of this site
``dedup/deal``    ``names``, ``keys``, ``signatures`` of all sites        ``sealed``: the key, for each of the others
                  (one site is asked)
``dedup/tags``    the same of the dealer, and ``sealed``                  ``tags`` of each row
``dedup/leave``   ``left-out``: places of rows                            ``examples``: training rows that are left
================  ======================================================  =========================================
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.secure.agreement import KEY, NONCE, TAG, KeyPair, seal, unseal
from fedfm.secure.letters import bytes_in, of_bytes, of_texts, table, texts_in

KEYS, DEAL, TAGS, LEAVE = "dedup/keys", "dedup/deal", "dedup/tags", "dedup/leave"
PHASES = (KEYS, DEAL, TAGS, LEAVE)
"""The tasks of a comparison, in their order."""
STATEMENT = "dedup key"
"""What a site signs of its public key is of this kind, and of no other message."""
SIGNATURE = 64
SEALED = NONCE + KEY + TAG
NAME = 4096
"""Bytes of a site's name, at most."""
WIDTH = 16
"""Bytes of a tag: two of a billion fingerprints share one by chance with probability below 1e-20."""


class Signer(Protocol):
    """A party's signing key and those of the others; see :class:`fedfm.deploy.seal.Seal`."""

    @property
    def others(self) -> Mapping[str, Any]:
        """Public keys by name."""
        ...

    def sign(self, kind: str, settings: Mapping[str, Any], content: bytes) -> bytes:
        """The signature."""
        ...

    def verify(self, who: str, signature: object, kind: str, settings: Mapping[str, Any], content: bytes) -> None:
        """See that it is that of ``who``."""
        ...


class Party:
    """A site in one comparison. Its secrets are in memory alone: a site that is restarted in between drops out.

    Args:
        name: of the site.
        run: name of the run.
        signer: its own signing key, and those of the sites that it knows.
    """

    def __init__(self, name: str, run: str, signer: Signer) -> None:
        self.name = name
        self.run = run
        self._signer = signer
        self._pair = KeyPair()
        self._dealt: bytes | None = None

    def keys(self) -> dict[str, torch.Tensor]:
        """Its public key, signed."""
        signature = self._signer.sign(STATEMENT, about(self.run, self.name), self._pair.public)
        return introduced([(self.name, self._pair.public, signature)])

    def deal(self, message: Tensors) -> dict[str, torch.Tensor]:
        """Draw the key and seal it for each of the others, in their order.

        Raises:
            BadUpdate: a public key is not that of a site which this one knows, or its own is missing. So do the others.
        """
        known = dict(self._known(message))
        if known.pop(self.name, None) != self._pair.public:
            raise BadUpdate("the coordinator passes another key on than this site's")
        self._dealt = os.urandom(KEY)
        sealed = [seal(self._pair.agreed(public, self._purpose), self._dealt) for public in known.values()]
        return of_bytes("sealed", table(sealed, SEALED))

    def tags(self, message: Tensors, rows: Sequence[Sequence[bytes]]) -> dict[str, torch.Tensor]:
        """The tags of its rows, ``[rows, fingerprints, bytes]``.

        Args:
            message: says who dealt.
            rows: the fingerprints of each row.
        """
        [(dealer, public)] = self._known(message, 1)
        key = self._dealt
        if dealer != self.name:
            sealed = bytes_in(message, "sealed", SEALED).tobytes()
            key = unseal(self._pair.agreed(public, self._purpose), sealed)
        if key is None:
            raise BadUpdate("the coordinator says that this site dealt the key, and it did not")
        whole = b"".join(tag(key, one) for prints in rows for one in prints)
        return of_bytes("tags", np.frombuffer(whole, np.uint8).reshape(len(rows), -1, WIDTH).copy())

    @property
    def _purpose(self) -> str:
        return f"dedup {self.run}"

    def _known(self, message: Tensors, count: int = -1) -> Iterator[tuple[str, bytes]]:
        """Sites and their public keys, each of which a site signed that this one knows."""
        keys = bytes_in(message, "keys", count, KEY)
        names = [text.decode(errors="replace") for text in texts_in(message, "names", len(keys), NAME)]
        if len(set(names)) < len(names):
            raise BadUpdate("the coordinator names a site twice")
        for name, key, signature in zip(
            names, keys, bytes_in(message, "signatures", len(keys), SIGNATURE), strict=True
        ):
            if name != self.name and name not in self._signer.others:
                raise BadUpdate(
                    f"it has no key of the site {name!r}, and shares none with strangers. Put {name}.pub into its "
                    "folder peers, or leave that site out"
                )
            if name != self.name:
                self._signer.verify(name, signature.tobytes(), STATEMENT, about(self.run, name), key.tobytes())
            yield name, key.tobytes()


def tag(key: bytes, fingerprint: bytes) -> bytes:
    """The tag of a fingerprint under the sites' key."""
    return hmac.digest(key, fingerprint, "sha256")[:WIDTH]


def about(run: str, site: str) -> dict[str, str]:
    """What is signed beside a public key."""
    return {"run": run, "site": site}


def introduced(sites: Sequence[tuple[str, bytes, bytes]]) -> dict[str, torch.Tensor]:
    """Names, public keys and signatures, to be sent."""
    names, keys, signatures = zip(*sites, strict=True)
    return {
        **of_texts("names", [name.encode() for name in names]),
        **of_bytes("keys", table(keys, KEY)),
        **of_bytes("signatures", table(signatures, SIGNATURE)),
    }
