"""Messages as they travel: bytes that Flower carries without looking in, and the seal over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import save, save_file

from fedfm.core import trees
from fedfm.core.update import Tensors
from fedfm.errors import BadUpdate
from fedfm.links.flower.client import packed
from fedfm.links.tickets import INLINE, digest, order
from fedfm.store.files import writing
from fedfm.wire import codec

if TYPE_CHECKING:
    from fedfm.deploy.guard import Guard


@dataclass(frozen=True)
class Parcel:
    """What clients are sent, packed.

    Args:
        order: in which the tensors were.
        size: bytes that count; none when there are no tensors.
        content: digest of the bytes.
        record: the bytes, where one message holds them.
        file: where they lie, if not.
    """

    order: list[int]
    size: int
    content: bytes
    record: ArrayRecord | None = None
    file: Path | None = None

    @classmethod
    def of(cls, tensors: Tensors, spool: Path | None = None) -> Parcel:
        """Pack tensors.

        Args:
            tensors: the message.
            spool: folder for the bytes of large ones; without it, all travel in one message.

        Raises:
            StoreError: the folder cannot be written.
        """
        plain = trees.unshared(tensors)
        if spool is None or codec.tensors_size(plain) <= INLINE:
            data = save(plain)
            return cls(order(tensors), len(data) if tensors else 0, digest(data), packed(data))
        with writing(spool):
            spool.mkdir(exist_ok=True)
            part = spool / f"{uuid4().hex}.down"
            save_file(plain, part)
        return cls(order(tensors), part.stat().st_size, digest(b"", part), file=part)

    def settings(self) -> dict[str, Any]:
        """What a task says of it."""
        return {"order": self.order, **({"size": self.size, "content": self.content.hex()} if self.file else {})}


def sealed(
    guard: Guard | None, kind: str, settings: Mapping[str, Any], content: bytes = b"", record: ArrayRecord | None = None
) -> tuple[RecordDict, bytes]:
    """A message as it travels, and its signature where there is a guard.

    Args:
        guard: signs.
        kind: such as ``hello`` or ``task``.
        settings: of the message.
        content: digest of the bytes that belong to it; that of no bytes unless given.
        record: the bytes.
    """
    signature = b""
    whole = dict(settings)
    records: dict[str, Any] = {"down": record} if record else {}
    if guard:
        whole, signature = guard.close(kind, settings, content or digest(b""))
        records["seal"] = ConfigRecord({"signature": signature})
    return RecordDict({"task": ConfigRecord(whole), **records}), signature


def opened(guard: Guard | None, client: str, content: Any, signed: bytes, file: Path | None = None) -> bytes:
    """See that a reply is from ``client`` and to the message so ``signed``; the digest of its bytes.

    Args:
        guard: knows the client's key.
        client: who should have sent it.
        content: the reply's records.
        signed: the signature of the message.
        file: bytes that belong behind those in the reply.

    Raises:
        BadUpdate: it is not.
    """
    if guard is None:
        return b""
    whole = digest(body(content), file)
    guard.open(client, content["seal"]["signature"], dict(content["done"]), whole, signed)
    return whole


def body(content: Any) -> bytes:
    """The bytes in a reply; none when it has none.

    Raises:
        BadUpdate: they are not bytes of fedfm.
    """
    if "up" not in content:
        return b""
    try:
        return bytes(content["up"]["bytes"].data)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadUpdate(f"the reply is not one of fedfm: {error!r}") from error
