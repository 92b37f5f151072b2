"""Near duplicates: Lee, Ippolito, Nystrom, Zhang, Eck, Callison-Burch, Carlini 2022, Deduplicating Training Data Makes
Language Models Better, ACL (arXiv 2107.06499).

The share of character 5-grams that two texts have in common, $J$, is estimated by MinHash (Broder 1997): with $b$ bands
of $r$ permutations each, two texts have a band in common with probability $1 - (1 - J^r)^b$.

Differences from the paper:
- Texts are of many owners, so bands are compared under a key that who compares has not
  (:mod:`fedfm.dedup.protocol`). Pairs that share a band are not looked at again by their true $J$, as nobody has both.
- 16 bands of 8 permutations, where the paper takes 450 of 20: for short texts, and as each band costs a millisecond.
- A row is left out when it matches one that stays; the paper builds clusters, in which rows may match through others.
- 5-grams are of characters, not of tokens, as in short texts a changed word changes most 5-grams of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedfm.core.method import Paper
from fedfm.dedup.deduplication import Deduplication
from fedfm.errors import RecipeError, require


@dataclass(frozen=True)
class Near(Deduplication):
    """Two rows match when a band of their MinHash signatures is the same, and their class.

    Args:
        bands: $b$.
        permutations: $r$, of each band.
        shingle: characters of an n-gram.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Deduplicating Training Data Makes Language Models Better",
        authors="Lee, Ippolito, Nystrom, Zhang, Eck, Callison-Burch, Carlini",
        year=2022,
        venue="ACL",
        arxiv="2107.06499",
    )
    id: ClassVar[str] = "near"

    bands: int = 16
    permutations: int = 8
    shingle: int = 5

    def __post_init__(self) -> None:
        for name in ("bands", "permutations", "shingle"):
            require(self, name, getattr(self, name) >= 1, "at least 1")

    @property
    def count(self) -> int:
        return self.bands

    def chance(self, share: float) -> float:
        """The probability that two texts match that have this share of n-grams in common."""
        return float(1 - (1 - share**self.permutations) ** self.bands)

    def shingles(self, text: str) -> set[str]:
        """The n-grams of a text; a shorter text is its own only one."""
        return {text[at : at + self.shingle] for at in range(max(1, len(text) - self.shingle + 1))}

    def fingerprints(self, text: str, label: str) -> Sequence[bytes]:
        try:
            from datasketch import MinHash
        except ImportError as error:
            raise RecipeError('deduplicate: near needs datasketch: pip install "fedfm[dedup]".') from error
        sketch = MinHash(num_perm=self.bands * self.permutations, seed=1)
        sketch.update_batch([gram.encode() for gram in sorted(self.shingles(text))])
        values = sketch.hashvalues.astype("<u8").reshape(self.bands, self.permutations)
        return [f"{band}:{len(label)}:{label}".encode() + row.tobytes() for band, row in enumerate(values)]
