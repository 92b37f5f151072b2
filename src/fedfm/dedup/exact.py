"""Exact duplicates: after Abadi, Dasu, Sarkar 2024, Privacy-Preserving Data Deduplication for Enhancing Federated
Learning of Language Models, NDSS 2025 (arXiv 2407.08152).

A text that many clients hold is learnt by heart; of equal rows one stays in the federation, and no text is shown for
it. The protocol is in :mod:`fedfm.dedup.protocol`.

Differences from the paper:
- The paper has clients intersect their sets group by group, with a trusted third party in either of its two protocols.
  Here two servers that must not work together take its place: one holds a key and sees blinded points, the other sees
  tags that it cannot compute. Deployed sites have one coordinator, and share a key that it has not
  (:mod:`fedfm.dedup.party`).
- The server that matches learns how often each unknown row occurs and at whom; in the paper clients learn what they
  have in common with each other.
- Who keeps a row is drawn row by row, where in the paper the order of the clients decides.
- Case, spacing and compatibility characters do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Paper
from fedfm.dedup.deduplication import Deduplication


@dataclass(frozen=True)
class Exact(Deduplication):
    """Two rows match when they say the same and have the same class."""

    paper: ClassVar[Paper | None] = Paper(
        title="Privacy-Preserving Data Deduplication for Enhancing Federated Learning of Language Models",
        authors="Abadi, Dasu, Sarkar",
        year=2024,
        venue="NDSS 2025",
        arxiv="2407.08152",
    )
    id: ClassVar[str] = "exact"

    @property
    def count(self) -> int:
        return 1

    def fingerprints(self, text: str, label: str) -> Sequence[bytes]:
        return [f"{len(label)}:{label}{text}".encode()]
