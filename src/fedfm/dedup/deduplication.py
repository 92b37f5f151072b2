"""The contract of deduplication: by which fingerprints two rows count as the same."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fedfm.core.traits import Part


class Deduplication(Part, ABC):
    """Subclasses are frozen dataclasses. Two rows match when they share a fingerprint."""

    id: ClassVar[str]

    @property
    @abstractmethod
    def count(self) -> int:
        """How many fingerprints each row has."""

    @abstractmethod
    def fingerprints(self, text: str, label: str) -> Sequence[bytes]:
        """The fingerprints of a row, ``count`` of them. They never leave a client as they are.

        Args:
            text: what it says, as :func:`plain` writes it.
            label: its class; empty where there is none. Rows of different classes must not match.
        """


def plain(row: Mapping[str, Any]) -> str:
    """What a row says: its messages with their roles, or its text; without case, and with single spaces.

    >>> plain({"text": "  Ａ  b\\n"})
    'a b'
    """
    said = row["text"] if "messages" not in row else "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
    return " ".join(unicodedata.normalize("NFKC", said).casefold().split())
