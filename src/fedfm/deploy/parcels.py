"""A site's large payloads, in files: what the coordinator sent in parts, and what it fetches in parts.

A file that was sent is called by the SHA-256 of its bytes, so a task that comes once more needs nothing sent again. The
newest of either kind is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfm.core.update import Update
from fedfm.deploy.channel import MAX_BODY
from fedfm.errors import BadUpdate
from fedfm.links.tickets import PART, digest
from fedfm.store.files import writing
from fedfm.wire import codec

_NAME = re.compile(r"[0-9a-f]{64}")


class Parcels:
    """The files of one site.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._out: tuple[Any, Path] | None = None
        with writing(folder):
            folder.mkdir(mode=0o700, exist_ok=True)

    def find(self, content: str) -> Path | None:
        """The file with these bytes, if it has come.

        Raises:
            BadUpdate: ``content`` is no SHA-256 in hexadecimal.
        """
        place = self._named(content)
        return place if place.exists() else None

    def put(self, settings: Mapping[str, Any], body: bytes) -> None:
        """Store one part of a file; the last one, which must come last, completes it.

        Args:
            settings: ``content``, the SHA-256 of the whole in hexadecimal; ``at``, the part's first byte; ``size`` of
                the whole.
            body: the part.

        Raises:
            BadUpdate: the part does not fit, or the whole is not what its name says.
            StoreError: the disk is full.
        """
        place = self._named(str(settings["content"]))
        at, size = settings["at"], settings["size"]
        whole = type(at) is int and type(size) is int and 0 <= at < size <= MAX_BODY and at % PART == 0
        if not whole or len(body) != min(PART, size - at):
            raise BadUpdate(f"{len(body)} bytes at {at!r:.40} are no part of {size!r:.40}")
        part = place.with_suffix(".part")
        with writing(part):
            for other in self.folder.glob("*"):
                if other not in (part, place) and not other.name.startswith("out"):
                    other.unlink()
            with part.open("r+b" if part.exists() else "w+b") as file:
                file.seek(at)
                file.write(body)
            if at + len(body) < size:
                return
            found = digest(b"", part).hex()
            if found != place.name:
                part.unlink()
                raise BadUpdate(f"the parts of {place.name} make {found}")
            part.replace(place)

    def pack(self, key: Any, update: Update) -> tuple[bytes, Path]:
        """Write the tensors of an update to a file, from which :meth:`part` reads.

        Args:
            key: of the task, known to whoever may fetch it.
            update: the update.

        Returns:
            The bytes before the tensors, and the file.

        Raises:
            StoreError: the disk is full.
        """
        place = self.folder / "out.safetensors"
        self._out = None
        with writing(place):
            head = codec.write(update, place)
        self._out = key, place
        return head, place

    def part(self, key: Any, at: Any) -> bytes | None:
        """The part of the packed update that begins at a byte; ``None`` when that of this task is not there.

        Raises:
            BadUpdate: no part begins there.
        """
        if self._out is None or self._out[0] != key:
            return None
        place = self._out[1]
        if type(at) is not int or not 0 <= at < place.stat().st_size or at % PART:
            raise BadUpdate(f"no part begins at {at!r:.40}")
        with place.open("rb") as file:
            file.seek(at)
            return file.read(PART)

    def _named(self, content: str) -> Path:
        if not _NAME.fullmatch(content):
            raise BadUpdate(f"{content!r:.80} is no SHA-256")
        return self.folder / content
