"""What secure aggregation costs: seconds and bytes of clients and of the server, beside the plain mean.

    python -m benchmarks.speed.secure           # prints the figures and writes results/secure.json
    python -m benchmarks.speed.secure ckks      # measures the rows of some protocols again, and keeps the others

One round without training: each client has an update of random values; its half of the protocol and the server's run
one after the other in this process. Seconds are those of the processor in one thread, of a client on average. Bytes are
those of a client that stays, as the codec writes messages; the model that goes down is left out, as it is the same for
all. Five percent of the clients, rounded up, drop out before they send their vector, which is when it costs most.

Where ``masked`` is less than the clients, so many made their vector, and the server added these again and again: its
work is the same, and the sum is not looked at. Everywhere else the sum is compared with that in the open.

Encryption is measured with drop-outs alone, which cost it nothing. It has a client that deals the key and two who open
the sum; what they do beside the others is in ``special``: seconds of these three on average, bytes up and down of one.
Of FedML-HE the map, which is made once, is left out: it costs a client a training, and encryption and opening as in a
round of CKKS. Of shares, ``special`` is what one who holds them does beside the others.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fedfm.core.mean import WeightedMean
from fedfm.core.update import Kind, Tensors, Update
from fedfm.results import machine
from fedfm.secure.cipher import Parameters
from fedfm.secure.ckks import CKKS
from fedfm.secure.fedml_he import FedMLHE
from fedfm.secure.fixed_point import BESIDE
from fedfm.secure.holder import Holder
from fedfm.secure.hub import Hub
from fedfm.secure.letters import of_bytes, of_numbers, of_texts, texts_in
from fedfm.secure.masked import Masked
from fedfm.secure.party import Party
from fedfm.secure.secagg import SecAgg
from fedfm.secure.secagg_plus import SecAggPlus
from fedfm.secure.secure import Secure
from fedfm.secure.selecting import Merger
from fedfm.secure.selector import Selector, inside, share, top
from fedfm.secure.sharer import Sharer
from fedfm.secure.smpc_additive import SMPCAdditive
from fedfm.store.files import write_json
from fedfm.wire import codec

RESULT = Path(__file__).parent / "results" / "secure.json"
PROTOCOLS: dict[str, Secure] = {
    "secagg": SecAgg(),
    "secagg-plus": SecAggPlus(),
    "secagg-plus, 10 neighbours": SecAggPlus(neighbours=10),
    "smpc-additive": SMPCAdditive(),
    "ckks": CKKS(),
    "ckks, max_weight 1": CKKS(max_weight=1),
    "fedml-he, ratio 0.1": FedMLHE(ratio=0.1),
}
CLIENTS, MEGABYTES, DROPPED = (10, 100), (1, 10), 0.05
MOST_MASKS = 5e8
"""Values of masks beyond which not every client makes its vector."""
MOST_ENCRYPTED = 1.5e8
"""Values beyond which not every client encrypts its own."""
SOME = 5
Result = TypeVar("Result")


class Clock:
    """Adds up seconds of the processor."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, act: Callable[..., Result], *arguments: Any) -> Result:
        began = time.process_time()
        try:
            return act(*arguments)
        finally:
            self.seconds += time.process_time() - began


def upload(client: int, values: int, most: float = 1e9) -> Update:
    """A client's update, of no more weight than ``most``."""
    draw = torch.Generator().manual_seed(client)
    tensors = {"w": torch.randn(values, generator=draw) * 1e-3}
    return Update(tensors, weight=min(most, 10.0 + client), member=f"{client:03}")


def sized(tensors: Tensors) -> int:
    return codec.size(Update(tensors, 0.0, kind=Kind.KNOWLEDGE))


def plain(clients: int, values: int, gone: set[int]) -> dict[str, Any]:
    """The mean of uploads that the server sees."""
    client, server = Clock(), Clock()
    mean = WeightedMean()
    sent = [client(codec.encode, upload(i, values)) for i in range(clients) if i not in gone]
    server(lambda: mean(codec.decode(data, f"{i}") for i, data in enumerate(sent)))
    return {
        "client_seconds": client.seconds / len(sent),
        "server_seconds": server.seconds,
        "client_bytes_up": len(sent[0]),
        "client_bytes_down": 0,
    }


def masked(protocol: Masked, clients: int, values: int, gone: set[int]) -> dict[str, Any]:
    """The same by masks."""
    client, masking, server = Clock(), Clock(), Clock()
    like = {"w": torch.zeros(values)}
    graph = protocol.graph(clients)
    code, needed = protocol.fixed_point, protocol.needed(len(graph[0]) + 1)
    ring = code.ring(clients)
    hub = Hub(1, [f"{i:03}" for i in range(clients)], graph, needed, code.length(like), ring)
    parties = [client(Party, 1, protocol.needed) for _ in range(clients)]
    up = down = 0

    def ask(i: int, do: Callable[..., Tensors], take: Callable[[int, Tensors], Any], *message: Tensors) -> None:
        nonlocal up, down
        answer = client(do, *message)
        if i not in gone:
            up, down = up + sized(answer), down + sum(map(sized, message))
        server(take, i, answer)

    for i in range(clients):
        ask(i, parties[i].keys, hub.keys)
    for i, message in server(hub.introductions).items():
        ask(i, parties[i].shares, hub.shares, message)
    present = server(hub.present)
    alive = [i for i in range(clients) if i not in gone]
    masks = clients * (len(graph[0]) + 1) * values
    made = alive if masks <= MOST_MASKS else alive[:SOME]
    some: list[Tensors] = []
    expected = np.zeros(code.length(like), np.int64)
    for place, i in enumerate(alive):
        client(parties[i].meet, present)
        if place < len(made):
            update = upload(i, values)
            some.append(masking(lambda i=i, u=update: parties[i].mask(code.encode(u, ring), ring)))
            expected += ring.signed(code.encode(update, ring))
        else:
            parties[i]._turn("masked", "unmask")
        answer = some[-1] if place < len(made) else some[place % SOME]
        up, down = up + sized(answer), down + sized(present)
        server(hub.add, i, answer)
        if len(made) == len(alive):
            some.clear()
    for i, message in server(hub.questions).items():
        ask(i, parties[i].unmask, hub.reveal, message)
    total = server(hub.total)
    if len(made) == len(alive):
        assert (total == expected).all(), "the sum is not that of the clients' integers"
        server(code.decode, total, len(alive), like, Kind.DELTA)
    return {
        "client_seconds": client.seconds / clients + masking.seconds / len(made),
        "server_seconds": server.seconds,
        "client_bytes_up": up / len(alive),
        "client_bytes_down": down / len(alive),
        "neighbours": len(graph[0]),
        "threshold": needed,
        "bytes_per_value": ring.width,
        "masked": len(made),
    }


def shared(protocol: SMPCAdditive, clients: int, values: int, gone: set[int]) -> dict[str, Any]:
    """The same by shares."""
    client, server, special = Clock(), Clock(), Clock()
    like, code = {"w": torch.zeros(values)}, protocol.fixed_point
    ring, length = code.ring(clients), code.length(like)
    sharers = [client(Sharer, 1, code, protocol.holders, protocol.threshold) for _ in range(clients)]
    # Who drops out is not among those who hold shares, as all of these are needed.
    holders = sharers[-protocol.holders :]
    keys = [client(one.keys)["secure:keys"].numpy() for one in sharers]
    question = of_bytes("keys", np.concatenate(keys[-protocol.holders :])) | of_numbers("clients", [clients])
    sealed = [client(one.deal, question) for one in sharers]
    held = []
    for place, holder in enumerate(holders):
        rows = np.stack([one["secure:sealed"].numpy()[place] for one in sealed])
        held.append(of_bytes("keys", np.concatenate(keys)) | of_bytes("sealed", rows))
        special(holder.hold, held[-1])
    total, expected, up = ring.zeros(length), np.zeros(length, np.int64), 0
    alive = [i for i in range(clients) if i not in gone]
    for i in alive:
        update = upload(i, values)
        client(sharers[i].meet, {})
        answer = client(lambda i=i, u=update: sharers[i].lock(code.encode(u, ring)))
        expected += ring.signed(code.encode(update, ring))
        total += server(lambda a=answer: ring.unpack(a["secure:share"].numpy()))
        up = sized(answer) + sized(sealed[i])
    last = of_numbers("survivors", alive) | of_numbers("length", [length])
    sums = [special(holder.open, last) for holder in holders]
    for one in sums:
        total += server(lambda a=one: ring.unpack(a["secure:sum"].numpy()))
    found = server(ring.signed, total)
    assert (found == expected).all(), "the sum is not that of the clients' integers"
    server(code.decode, found, len(alive), like, Kind.DELTA)
    return {
        "client_seconds": client.seconds / clients,
        "server_seconds": server.seconds,
        "client_bytes_up": up,
        "client_bytes_down": sized(question),
        "special": {
            "seconds": special.seconds / len(holders),
            "opener_bytes_down": sized(held[0]) + sized(last),
            "opener_bytes_up": sized(sums[0]),
        },
        "bytes_per_value": ring.width,
        "masked": len(alive),
    }


def encrypted(protocol: CKKS, clients: int, values: int, gone: set[int]) -> dict[str, Any]:
    """The same by encryption."""
    client, locking, server, special = Clock(), Clock(), Clock(), Clock()
    like, code = {"w": torch.zeros(values)}, protocol.fixed_point
    ratio = protocol.ratio if isinstance(protocol, FedMLHE) else 1.0
    count = share(ratio, values)
    own, ring = Parameters.of(code.largest(clients), clients), code.ring(clients)
    mask = top(np.random.default_rng(0).integers(0, 2**20, values), count)
    chosen, size = inside(mask, values, count), count + BESIDE
    merger = server(Merger, code, own, chosen)
    holders = [Selector(1, code, ratio, mask) if ratio < 1 else Holder(1, code) for _ in range(clients)]
    keys = []
    for holder in holders:
        keys.append(client(holder.keys)["secure:keys"].numpy())
    public = of_bytes("keys", np.concatenate(keys))
    dealt = special(holders[-1].deal, public)
    marks = public | of_numbers("dealer", [clients - 1]) | dealt
    alive = [i for i in range(clients) if i not in gone]
    made = alive if clients * count <= MOST_ENCRYPTED else alive[:SOME]
    some: list[Tensors] = []
    expected = np.zeros(code.length(like), np.int64)
    up = sized(of_bytes("keys", keys[0]))
    for place, i in enumerate(alive):
        client(holders[i].meet, marks)
        if place < len(made):
            update = upload(i, values, code.max_weight)
            some.append(locking(holders[i].lock, update))
            expected += ring.signed(code.encode(update, ring))
        answer = some[-1] if place < len(made) else some[place % SOME]
        server(lambda a=answer: merger.add(texts_in(a, "cipher", len(own.lengths(size)), own.most), a))
        up += sized(answer) if i == alive[0] else 0
        if len(made) == len(alive):
            some.clear()
    question = of_texts("cipher", server(merger.adder.texts))
    answers = [special(holders[i].open, question)["secure:sum"].numpy() for i in made[: protocol.openers]]
    assert (answers[0] == answers[1]).all(), "clients opened the sum in two ways"
    total = server(lambda: merger.total(ring.signed(ring.unpack(answers[0]))) if len(made) == len(alive) else None)
    if total is not None:
        assert (total == expected).all(), "the sum is not that of the clients' integers"
        server(code.decode, total, len(alive), like, Kind.DELTA)
    return {
        "client_seconds": client.seconds / clients + locking.seconds / len(made),
        "server_seconds": server.seconds,
        "client_bytes_up": up,
        "client_bytes_down": sized(marks),
        "special": {
            "seconds": special.seconds / (1 + protocol.openers),
            "dealer_bytes_up": sized(dealt),
            "opener_bytes_down": sized(question),
            "opener_bytes_up": sized(of_bytes("sum", answers[0])),
        },
        "masked": len(made),
    }


def main() -> int:
    """Measure, print, write, row by row."""
    wanted = sys.argv[1:]
    if wanted and (unknown := [name for name in wanted if name not in {"plain", *PROTOCOLS}]):
        print(f"no protocol {unknown[0]!r}; there are {', '.join(['plain', *PROTOCOLS])}", file=sys.stderr)
        return 2
    before = json.loads(RESULT.read_text())["rows"] if wanted and RESULT.exists() else []
    rows: list[dict[str, Any]] = [row for row in before if row["protocol"] not in wanted]
    head = ("protocol", "clients", "MB", "gone", "client s", "server s", "up MB", "down MB")
    print("{:<28}{:>8}{:>5}{:>6}{:>10}{:>10}{:>9}{:>9}".format(*head))
    for size in MEGABYTES:
        values = size * 10**6 // 4
        for clients in CLIENTS:
            for share_gone in (0.0, DROPPED):
                gone = set(range(math.ceil(share_gone * clients)))
                for name in ("plain", *PROTOCOLS):
                    if "neighbours" in name and clients <= 11:
                        continue  # all others are neighbours, as in SecAgg
                    if (wanted and name not in wanted) or (isinstance(PROTOCOLS.get(name), CKKS) and not gone):
                        continue  # to encryption it is all the same whether some drop out
                    found = measured(PROTOCOLS.get(name), clients, values, gone)
                    row = {"protocol": name, "clients": clients, "megabytes": size, "dropped": len(gone), **found}
                    rows.append(row)
                    write_json(RESULT, {"rows": rows, "machine": machine()})
                    line = (name, clients, size, len(gone), found["client_seconds"], found["server_seconds"])
                    ways = (found["client_bytes_up"] / 1e6, found["client_bytes_down"] / 1e6)
                    print("{:<28}{:>8}{:>5}{:>6}{:>10.3f}{:>10.2f}{:>9.2f}{:>9.3f}".format(*line, *ways), flush=True)
    return 0


def measured(protocol: Secure | None, clients: int, values: int, gone: set[int]) -> dict[str, Any]:
    """A row of the table."""
    if isinstance(protocol, CKKS):
        return encrypted(protocol, clients, values, gone)
    if isinstance(protocol, SMPCAdditive):
        return shared(protocol, clients, values, gone)
    return masked(protocol, clients, values, gone) if isinstance(protocol, Masked) else plain(clients, values, gone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
