"""Bytes of all sorts: what is no update is refused, what is one means the same when it is written again."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedfm.core import trees
from fedfm.core.method import Client, Method, Work
from fedfm.core.update import Kind, Member, Tensors, Update
from fedfm.errors import BadUpdate
from fedfm.links.node import Node
from fedfm.links.tickets import NEVER, alike, order
from fedfm.links.worker import Worker
from fedfm.store.clients import ClientStore
from fedfm.wire import codec
from fedfm.wire.admit import Limits, admit

FUZZ = settings(max_examples=300, deadline=None, derandomize=True)

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


def said(error: BadUpdate) -> None:
    """See that a refusal has a reason."""
    assert str(error)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, with those of every NaN."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def meaning(update: Update) -> tuple[Any, ...]:
    """All that an update says, in a form that can be compared; metrics that are not finite never travel."""
    stored = {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in update.tensors.items()}
    finite = {name: value for name, value in update.metrics.items() if math.isfinite(value)}
    return stored, repr(update.weight), finite, update.kind, update.member


def refused_or_read(data: bytes) -> Update | None:
    """The update in the bytes; ``None`` when they are refused. Nothing else may happen."""
    try:
        update = codec.decode(data, "eve")
    except BadUpdate as error:
        said(error)
        return None
    assert update.member == "eve"
    assert all(type(value) is float for value in (update.weight, *update.metrics.values()))
    again = codec.encode(update)
    assert codec.size(update) == len(again)
    assert meaning(codec.decode(again, "eve")) == meaning(update)
    # What a server does next is as bounded.
    for expected in (None, {"w": torch.zeros(2, 3)}):
        try:
            admit(update, Kind.DELTA, expected, Limits())
        except BadUpdate as error:
            said(error)
    return update


# Whole updates.

NAMES = st.text(max_size=6).filter(lambda name: name != "__metadata__")  # a name that safetensors has for itself
SHAPES = st.lists(st.integers(0, 3), max_size=3)
METRICS = st.dictionaries(st.text(max_size=6), st.floats(), max_size=4)


@st.composite
def arrays(draw: Callable[[Any], Any], shapes: Any = SHAPES) -> torch.Tensor:
    """A tensor of any type, with any bits, also without dimensions or without numbers."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


UPDATES = st.builds(
    Update,
    tensors=st.dictionaries(NAMES, arrays(), max_size=4),
    weight=st.floats(),
    metrics=METRICS,
    kind=st.sampled_from(Kind),
    member=st.just("eve"),
)


@FUZZ
@given(UPDATES)
def test_every_update_comes_back_to_the_bit(update: Update) -> None:
    data = codec.encode(update)
    assert codec.size(update) == len(data)
    back = codec.decode(data, "eve")
    assert meaning(back) == meaning(update)
    assert set(back.metrics) == {name for name, value in update.metrics.items() if math.isfinite(value)}


ALMOST_GOOD = st.builds(
    Update,
    tensors=st.fixed_dictionaries({"w": arrays(st.just([2, 3]) | SHAPES)}, optional={"v": arrays()}),
    weight=st.floats(0.5, 100) | st.floats(),
    metrics=st.just({"loss": 0.5}) | METRICS,
    kind=st.sampled_from([Kind.DELTA, Kind.DELTA, Kind.KNOWLEDGE]),
)


@FUZZ
@given(ALMOST_GOOD)
def test_what_is_admitted_is_finite_and_what_was_asked_for(update: Update) -> None:
    expected = {"w": torch.zeros(2, 3)}
    try:
        admit(update, Kind.DELTA, expected, Limits())
    except BadUpdate as error:
        said(error)
        return
    assert update.kind is Kind.DELTA
    assert 0 < update.weight <= 1e9
    assert all(math.isfinite(value) for value in update.metrics.values())
    assert {name: tensor.shape for name, tensor in update.tensors.items()} == {"w": (2, 3)}
    assert torch.isfinite(update.tensors["w"].double()).all()


# Updates with damage.


def sources() -> list[bytes]:
    """A few good updates, of the types that travel most."""
    draw = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(2, 3, generator=draw), torch.randn(4, generator=draw)
    updates = (
        Update({}),
        Update({"w": matrix}, 3.0, {"loss": 0.5, "steps": 2.0}),
        Update({"w": matrix.to(torch.bfloat16), "layers.0.lora_A": vector.to(torch.float8_e4m3fn)}, kind=Kind.WEIGHTS),
        Update({"ids": torch.arange(5), "mask": vector > 0, "number": torch.tensor(1.5)}, 0.0, kind=Kind.KNOWLEDGE),
        Update({"topk:w": torch.empty(0, 2, 3), "topk-values": vector, "topk-positions": torch.arange(4).int()}),
    )
    return [codec.encode(update) for update in updates]


SOURCES = sources()
# The tables stand at the beginning: most damage is done there.
PLACES = st.integers(0, 160) | st.integers(0, 2**16)
SIGNS = [b"0", b"9", b"-", b"[", b"]", b"{", b"}", b'"', b",", b"\0"]
BYTES = st.binary(min_size=1, max_size=8) | st.sampled_from(SIGNS)
EDITS = st.lists(st.tuples(st.sampled_from(("flip", "set", "cut", "insert")), PLACES, BYTES), min_size=1, max_size=6)


def damaged(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """The bytes after some edits."""
    out = bytearray(data)
    for how, place, what in edits:
        at = place % (len(out) + 1)
        if how == "flip" and at < len(out):
            out[at] ^= 1 << what[0] % 8
        elif how == "set":
            out[at : at + len(what)] = what
        elif how == "cut":
            del out[at : at + 1 + what[0] % 16]
        elif how == "insert":
            out[at:at] = what
    return bytes(out)


@FUZZ
@given(st.sampled_from(SOURCES), EDITS)
def test_a_damaged_update_is_refused_or_is_another_update(data: bytes, edits: Any) -> None:
    refused_or_read(damaged(data, edits))


@FUZZ
@given(st.sampled_from(SOURCES), PLACES, st.sampled_from(SOURCES), PLACES)
def test_two_updates_spliced_are_refused_or_are_another_update(one: bytes, end: int, two: bytes, begin: int) -> None:
    refused_or_read(one[: end % (len(one) + 1)] + two[begin % (len(two) + 1) :])


@FUZZ
@given(st.binary(max_size=64))
def test_bytes_after_a_good_beginning_are_refused_or_read(data: bytes) -> None:
    refused_or_read(codec.MAGIC + data)
    refused_or_read(SOURCES[0][: -len(save({}))] + data)


# Headers and tables that are JSON, but not what they should be.

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
HEADERS = VALUES | st.fixed_dictionaries(
    {
        "kind": st.sampled_from([kind.value for kind in Kind]) | VALUES,
        "weight": st.floats() | VALUES,
        "metrics": st.dictionaries(st.text(max_size=6), st.floats() | VALUES, max_size=4) | VALUES,
    },
    optional={"member": VALUES},
)
COUNTS = st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1])
TYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "X", ""])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": TYPES | VALUES,
        "shape": st.lists(COUNTS, max_size=4) | VALUES,
        "data_offsets": st.just([0, 0]) | st.lists(COUNTS, min_size=2, max_size=2) | VALUES,
    }
)
TABLES = st.dictionaries(st.sampled_from(["w", "v", "__metadata__", ""]) | NAMES, ENTRIES | VALUES, max_size=3)


def framed(header: bytes, table: bytes, data: bytes = b"") -> bytes:
    """An update of a header, a table of tensors and data."""
    return codec.MAGIC + struct.pack("<I", len(header)) + header + struct.pack("<Q", len(table)) + table + data


@FUZZ
@given(HEADERS)
def test_any_json_as_a_header_is_refused_or_read(header: Any) -> None:
    refused_or_read(framed(json.dumps(header).encode(), b"{}"))


@FUZZ
@given(TABLES, st.sampled_from([b"", bytes(2), bytes(8), bytes(24)]))
def test_any_table_is_refused_or_read(table: Any, data: bytes) -> None:
    update = refused_or_read(framed(b'{"kind":"delta","weight":1,"metrics":{}}', json.dumps(table).encode(), data))
    # Whatever shapes were claimed: there are no more numbers than there were bytes.
    assert update is None or trees.nbytes(update.tensors) == len(data)


# Messages of a server.


@dataclass(frozen=True)
class Echo(Method):
    """A client that sends back what it received."""

    def local(self, client: Client, message: Tensors) -> Work:
        yield from ()
        return Update(message, client.member.examples)


def answered(task: dict[str, Any], down: bytes) -> None:
    """Have a client read a message: it refuses, or sends an update."""
    trainer: Any = SimpleNamespace(group=1, pulse=None)
    node = Node(Member("ann", 5), Worker(Echo(), trainer, ClientStore()))
    report, up = node.task(task, down)
    if report["status"] == "done":
        assert refused_or_read(up) is not None
    else:
        assert up is None
        assert report["reason"]


MESSAGES = [codec.decode(data, "ann").tensors for data in SOURCES]
TASK = {
    "phase": "local",
    "round": 1,
    "client": "ann",
    "accepted": list(NEVER),
    "ticket": [1, 1],
    **alike(Echo(), (), 0, False),
}
PLAIN = st.integers(-2, 3) | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4) | st.booleans()
SETTINGS = st.sampled_from([*TASK, "order"])


@FUZZ
@given(st.sampled_from(MESSAGES), EDITS)
def test_a_damaged_message_is_refused_or_is_another_message(message: Tensors, edits: Any) -> None:
    answered({**TASK, "order": order(message)}, damaged(save(trees.unshared(message)), edits))


@FUZZ
@given(
    st.sampled_from(MESSAGES),
    st.dictionaries(SETTINGS, PLAIN | st.lists(PLAIN, max_size=3), min_size=1, max_size=2),
    st.sets(SETTINGS, max_size=1),
)
def test_a_task_with_any_settings_is_refused_or_done(message: Tensors, changes: Any, left_out: set[str]) -> None:
    """With all types that a Flower record holds."""
    task = {**TASK, "order": order(message), **changes}
    answered({name: value for name, value in task.items() if name not in left_out}, save(trees.unshared(message)))


@FUZZ
@given(TABLES, st.sampled_from([b"", bytes(2), bytes(8), bytes(24)]))
def test_a_message_of_any_table_is_refused_or_done(table: Any, data: bytes) -> None:
    text = json.dumps(table).encode()
    places = list(range(len(table) - ("__metadata__" in table)))
    answered({**TASK, "order": places}, struct.pack("<Q", len(text)) + text + data)
