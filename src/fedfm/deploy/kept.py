"""Which of a site's rows count in a run that leaves duplicates out: on the site's disk, so that it outlives a process.

Places of rows mean nothing when the rows are others, so a digest of what they say stands beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from fedfm.data.duplicates import fingerprints
from fedfm.dedup import Deduplication, Exact
from fedfm.deploy.policy import Policy
from fedfm.errors import BadUpdate, DataError
from fedfm.store.files import write_bytes

BLOCK = 500
"""Rows after which a sign of work is due."""


class Kept:
    """The rows of one run.

    Args:
        place: the file.
        kind: by what rows match.
    """

    def __init__(self, place: Path, kind: Deduplication) -> None:
        self.place = place
        self.kind = kind

    @property
    def known(self) -> bool:
        """Whether the site was told which rows to leave out."""
        return self._read().get("left_out") is not None

    def fingerprints(self, rows: Dataset, tell: Callable[[], None] = lambda: None) -> list[Sequence[bytes]]:
        """The fingerprints of all rows; from now on they may not change.

        Args:
            rows: of the site.
            tell: called while work goes on.

        Raises:
            BadUpdate: the site was told what to leave out already.
        """
        if self.known:
            raise BadUpdate("its rows were compared already in this run")
        found = _fingerprints(self.kind, rows, tell)
        self._write({"kind": repr(self.kind), "rows": len(rows), "digest": _digest(rows), "left_out": None})
        return found

    def leave(self, rows: Dataset, out: Sequence[int], policy: Policy) -> None:
        """Note which rows are left out. Told once more the same changes nothing.

        Args:
            rows: of the site.
            out: their places.
            policy: of the site.

        Raises:
            BadUpdate: these rows were not compared, or other places were told before, or there are none of them.
            Refused: the policy does not allow so many.
        """
        noted = self._noted(rows)
        if noted["left_out"] is not None and noted["left_out"] != list(out):
            raise BadUpdate("it is told to leave out other rows than before in this run")
        if list(out) != sorted(set(out)) or not all(0 <= at < len(rows) for at in out):
            raise BadUpdate("the rows that it is told to leave out are not places of its rows, in order and each once")
        policy.see_left_out(len(out), len(rows))
        if len(out) == len(rows):
            raise BadUpdate("of all its rows others keep one that matches, so it has nothing to train on")
        self._write({**noted, "left_out": list(out)})

    def of(self, rows: Dataset) -> Dataset:
        """The rows that count; all while nothing was told.

        Raises:
            DataError: these are other rows than those that were compared.
        """
        if not self.known:
            return rows
        return rows.select(np.setdiff1d(np.arange(len(rows)), self._noted(rows)["left_out"]))

    def _noted(self, rows: Dataset) -> dict[str, Any]:
        noted = self._read()
        if not noted:
            raise BadUpdate("its rows were not compared in this run")
        if noted["kind"] != repr(self.kind):
            raise BadUpdate(f"its rows were compared by {noted['kind']}, and the recipe says {self.kind!r}")
        if noted["digest"] != _digest(rows):
            raise DataError("the rows are not those that were compared in this run. Put them back, or start a new run.")
        return noted

    def _read(self) -> dict[str, Any]:
        return dict(json.loads(self.place.read_text())) if self.place.exists() else {}

    def _write(self, noted: dict[str, Any]) -> None:
        write_bytes(self.place, json.dumps(noted).encode(), private=True)


def _fingerprints(kind: Deduplication, rows: Dataset, tell: Callable[[], None]) -> list[Sequence[bytes]]:
    """Classes count by their names, as each site may number its own."""
    if isinstance(feature := rows.features.get("label"), ClassLabel):
        names = ["" if value is None else feature.int2str(value) for value in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", names)
    found: list[Sequence[bytes]] = []
    for start in range(0, len(rows), BLOCK):
        found += fingerprints(kind, rows, np.arange(start, min(start + BLOCK, len(rows))))
        tell()
    return found


def _digest(rows: Dataset) -> str:
    whole = hashlib.sha256()
    for [one] in _fingerprints(Exact(), rows, lambda: None):
        whole.update(hashlib.sha256(one).digest())
    return whole.hexdigest()
