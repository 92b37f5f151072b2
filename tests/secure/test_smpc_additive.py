"""Uploads that are split into shares: the numbers, the dropped, what each party sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

pytest.importorskip("flwr")

from fedfm.core.method import Method
from fedfm.core.trees import count
from fedfm.core.update import Tensors, Update
from fedfm.errors import BadUpdate, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.flower import InMemoryFlower
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.observe import Observer
from fedfm.sample import Poisson, Uniform
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.letters import MARK, of_bytes, of_numbers
from fedfm.secure.secagg import SecAgg
from fedfm.secure.sharer import Sharer
from fedfm.secure.smpc_additive import SMPCAdditive
from fedfm.train import Fused, Trainer
from fedfm.wire import AdaptiveClip, Clip, DistributedGaussian, Gaussian
from tests.links.outcome import files, timeless
from tests.secure.links import Wire
from tests.secure.test_secure_runs import SGD, Half, Losing, Quantised, crowd, same

Make = Callable[..., Federation]
CODE = FixedPoint(24, 1.0, 65536)


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method, **{"engine": Trainer, "evaluation": Evaluation(every=0), "secure": SMPCAdditive(), **changes}
    )


def opened(federation: Make, method: Method, **changes: Any) -> Tensors:
    """The weights of the run whose uploads are quantised and summed in the open."""
    return federation(method, **{"mean": Quantised(), "secure": None, **changes}).run().state.weights


def of(wire: Wire, phase: str, round: int, name: str) -> dict[str, np.ndarray]:
    """What clients sent in a task, by client."""
    return {c: t[MARK + name].numpy() for at, r, c, t in wire.got if (at, r) == (phase, round)}


# The numbers.


@pytest.mark.parametrize("method", [FedIT(), FedAvg(weighting="clients"), Half(), Scaffold()], ids=lambda m: m.id)
@pytest.mark.parametrize("holders", [1, 3])
def test_a_run_is_that_with_the_open_sum_of_the_same_integers(federation: Make, method: Method, holders: int) -> None:
    outcome = federation(method, training=SGD, secure=SMPCAdditive(holders=holders)).run()
    assert same(outcome.state.weights, opened(federation, method, training=SGD))
    if holders == 3:
        masked = federation(method, training=SGD, secure=SecAgg(threshold=0.5)).run()
        assert same(outcome.state.weights, masked.state.weights)


def test_clients_trained_together_are_summed_alike(federation: Make) -> None:
    assert same(federation(FedIT(), engine=Fused).run().state.weights, opened(federation, FedIT(), engine=Fused))


def test_a_resumed_run_is_bit_equal(federation: Make, tmp_path: Path) -> None:
    whole = federation(Half(), rounds=3).run(tmp_path / "whole")
    half = federation(Half(), rounds=3)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 2:
                half.stop()

    assert half.run(tmp_path / "half", observers=[Quit()]).status == "stopped"
    resumed = federation(Half(), rounds=3).run(tmp_path / "half", resume=True)
    assert same(whole.state.weights, resumed.state.weights)


def test_flower_is_bit_equal_to_in_process(federation: Make, tmp_path: Path) -> None:
    here = federation(Half()).run(tmp_path / "here")
    there = federation(Half(), link=InMemoryFlower).run(tmp_path / "there")
    assert same(here.state.weights, there.state.weights)
    assert timeless(here.records) == timeless(there.records)
    assert files(tmp_path / "here/clients") == files(tmp_path / "there/clients") != {}


# What the parties see.


def test_all_shares_but_one_are_uniform_and_all_of_them_are_the_vector() -> None:
    """A round without links: three shares of vectors that are far from uniform."""
    values, ring = 20_000, CODE.ring(4)
    made = [Sharer(1, CODE, 2, 0.5) for _ in range(4)]
    keys = np.concatenate([one.keys()["secure:keys"].numpy() for one in made])
    question = of_bytes("keys", keys[1:3].copy()) | of_numbers("clients", [4])
    sealed = np.stack([one.deal(question)["secure:sealed"].numpy() for one in made])
    vectors = [CODE.encode(Update({"w": torch.full((values,), 0.25 * k)}, 2.0), ring) for k in range(4)]
    expected = [ring.signed(vector.copy()) for vector in vectors]
    for place, holder in enumerate((1, 2)):
        answer = made[holder].hold(of_bytes("keys", keys) | of_bytes("sealed", sealed[:, place].copy()))
        assert answer["secure:opened"].tolist() == [[1]] * 4
    shares = []
    for one, vector in zip(made, vectors, strict=True):
        assert one.meet({"w": torch.ones(1), "secure:x": torch.ones(1)}).keys() == {"w"}
        shares.append(one.lock(vector)["secure:share"].numpy())
    ask = of_numbers("survivors", [0, 1, 3]) | of_numbers("length", [values + 2])
    sums = [made[holder].open(ask)["secure:sum"].numpy() for holder in (1, 2)]
    for share in (*shares, *sums):
        assert share.shape == (values + 2, 6)
        assert chisquare(np.bincount(share.reshape(-1), minlength=256)).pvalue > 1e-6
    unpacked = [ring.unpack(share) for share in (shares[0], shares[1], shares[3])]
    server = sum(unpacked[1:], unpacked[0].copy())
    parts = [ring.unpack(one) for one in sums]
    # The server's and one holder's share: still uniform. With the other's, the sum of clients 0, 1 and 3.
    for part in parts:
        assert chisquare(np.bincount(ring.pack(server + part).reshape(-1), minlength=256)).pvalue > 1e-6
    total = ring.signed(server + parts[0] + parts[1])
    assert (total == expected[0] + expected[1] + expected[3]).all()
    assert total[0] == 2 * (int(0.25 * CODE.levels) + int(0.75 * CODE.levels))


def test_nothing_but_shares_reaches_the_server(federation: Make) -> None:
    wire = Wire()
    outcome = federation(FedIT(), link=wire).run()
    names: dict[str, set[str]] = {}
    for phase, _, _, tensors in wire.got:
        names.setdefault(phase, set()).update(name.removeprefix(MARK) for name in tensors)
    assert names == {
        "secure/keys": {"keys"},
        "secure/deal": {"sealed"},
        "secure/hold": {"opened"},
        "local": {"share"},
        "secure/open": {"sum"},
    }
    values = count(outcome.state.weights)
    for name in ("ann", "bob", "cid"):
        rows = [of(wire, "local", r, "share")[name] for r in (1, 2)]
        assert rows[0].shape == (values + 2, 6)
        for row in (*rows, rows[0] - rows[1]):
            assert chisquare(np.bincount(row.reshape(-1), minlength=256)).pvalue > 1e-6
    for record in outcome.records[1:]:
        assert record["train_loss"] is None
        assert all(p.keys() <= {"seconds", "steps", "bytes_up", "memory"} for p in record["participants"].values())
        assert record["secure"].items() >= {"kind": "smpc-additive", "asked": 3, "summed": 3, "clamped": 0.0}.items()


def test_keys_and_seeds_are_new_in_each_round_and_holders_are_others(federation: Make) -> None:
    wire = Wire()
    outcome = federation(FedIT(), members=crowd(4), rounds=3, link=wire).run()
    assert [r["secure"]["holders"] for r in outcome.records[1:]] == [["c1", "c2"], ["c2", "c3"], ["c3", "c0"]]
    assert [wire.phases(r)["secure/open"] for r in (1, 3)] == [["c1", "c2"], ["c0", "c3"]]
    keys = [t["secure:keys"].numpy().tobytes() for phase, _, _, t in wire.got if phase == "secure/keys"]
    assert len(set(keys)) == 12


# Noise.


def test_parts_of_the_noise_add_up_to_that_of_the_sum(federation: Make) -> None:
    """Of 5 asked at a threshold of a half, 3 are enough: each adds (z L)^2 / 3, so all have (z L)^2 * 5 / 3."""
    secure = SMPCAdditive(bits=24)
    code = secure.code((Clip(0.5), DistributedGaussian(1.3)))
    ring, length = code.ring(5), 20_000
    total = ring.zeros(length + 2)
    for k in range(5):
        vector = code.encode(Update({"w": torch.zeros(length)}, 1.0), ring)
        code.blur(vector, 5, np.random.default_rng(k))
        total += vector
    noise = ring.signed(total)[:-2] / code.levels
    assert kstest(noise / (1.3 * math.sqrt(5 / 3)), "norm").pvalue > 1e-4
    assert kstest(noise / 1.3, "norm").pvalue < 1e-4


def test_noise_of_clients_and_of_the_server_go_with_it(federation: Make) -> None:
    noisy: dict[str, Any] = {"stages": (Clip(0.5), DistributedGaussian(1.0, delta=1e-3))}
    here = federation(FedIT(), **noisy).run()
    assert same(here.state.weights, federation(FedIT(), **noisy, secure=SecAgg(threshold=0.5)).run().state.weights)
    assert here.records[1]["privacy"]["clients"]["epsilon"] > 0
    central: dict[str, Any] = {
        "stages": (AdaptiveClip(0.05), Gaussian(0.1, delta=1e-3)),
        "sampler": Poisson(rate=1.0),
    }
    unseen = federation(FedIT(), **central, secure=SMPCAdditive(max_value=0.5, max_weight=1)).run()
    code = Quantised(code=FixedPoint(24, 0.5, 1))
    assert same(unseen.state.weights, opened(federation, FedIT(), **central, mean=code))


# Who drops out, and who lies.


@pytest.mark.parametrize("phase", ["secure/keys", "secure/deal", "local"])
def test_a_run_with_drop_outs_is_that_of_the_others(federation: Make, phase: str) -> None:
    people = crowd(7)
    # In round 1 c1 and c2 hold the shares, as long as they send keys.
    lost = ("c0", "c5", "c6")
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(gone={phase: lost})).run()
    left = people.only("c1", "c2", "c3", "c4")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))
    record = outcome.records[1]
    assert [d["client"] for d in record["dropped"]] == list(lost)
    assert (record["secure"]["summed"], sorted(record["participants"])) == (4, ["c1", "c2", "c3", "c4"])


def test_a_holder_who_cannot_train_still_opens(federation: Make) -> None:
    people = crowd(5)
    outcome = federation(Losing(lost=("c1",)), members=people, rounds=1).run()
    record = outcome.records[1]
    assert record["secure"]["holders"] == ["c1", "c2"]
    left = people.only("c0", "c2", "c3", "c4")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))


@pytest.mark.parametrize("phase", ["secure/hold", "secure/open"])
def test_without_a_holder_the_round_does_not_count(federation: Make, phase: str) -> None:
    made = federation(Half(), members=crowd(4), rounds=1, link=Wire(gone={phase: ("c2",)}))
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"].startswith(
        "'c2' holds shares of all and is gone, and 2 who hold shares are needed; the last to drop out: gone"
    )
    assert same(outcome.state.weights, made.start().weights)


@pytest.mark.parametrize(
    ("phase", "lost", "words"),
    [
        ("secure/keys", 2, "2 of 4 clients sent keys, too few for 2 who hold shares"),
        ("secure/deal", 2, "2 of 4 updates could be used, but a round needs 3"),
        ("local", 2, "2 of 4 updates could be used, but a round needs 3"),
    ],
)
def test_with_too_few_left_the_round_does_not_count(federation: Make, phase: str, lost: int, words: str) -> None:
    wire = Wire(gone={phase: tuple(f"c{k}" for k in (0, 3)[:lost])})
    made = federation(Half(), members=crowd(4), rounds=1, link=wire)
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"] == words
    assert same(outcome.state.weights, made.start().weights)
    assert ("local" in wire.phases(1)) == (phase == "local"), "nobody trains in vain"


def test_bad_answers_drop_their_senders_by_name(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        match (phase, client):
            case ("secure/keys", "c0"):
                return {}
            case ("secure/keys", "c3"):
                return {MARK + "keys": tensors[MARK + "keys"] * 0}
            case ("secure/deal", "c4"):
                return {MARK + "sealed": tensors[MARK + "sealed"][1:]}
            case ("secure/deal", "c5"):
                return {MARK + "sealed": tensors[MARK + "sealed"].flip(0)}
            case ("local", "c6"):
                return {MARK + "share": tensors[MARK + "share"][:-1]}
        return tensors

    people = crowd(11)
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(forge=forge)).run()
    record = outcome.records[1]
    reasons = {d["client"]: d["reason"] for d in record["dropped"]}
    assert list(reasons) == ["c0", "c3", "c4", "c5", "c6"]
    assert reasons["c0"] == "'keys' must be bytes [1, 32], but is nothing"
    assert reasons["c3"] == "its public key is none"
    assert reasons["c4"] == "'sealed' must be bytes [2, 60], but is torch.uint8 [1, 60]"
    assert reasons["c5"] == "what it sealed for the holders cannot be opened"
    assert reasons["c6"].startswith("'share' must be bytes [")
    left = people.only(*(i for i in people.ids if i not in reasons))
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))
    assert sorted(record["participants"]) == sorted(left.ids)


def test_two_clients_with_one_key_are_not_let_in(federation: Make) -> None:
    first: list[Tensors] = []

    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if phase != "secure/keys" or client not in ("c0", "c3"):
            return tensors
        first.append(tensors)
        return first[0]

    record = federation(FedIT(), members=crowd(5), rounds=1, link=Wire(forge=forge)).run().records[1]
    assert record["dropped"] == [{"client": "c3", "reason": "its public key is another client's"}]


@pytest.mark.parametrize("phase", ["local", "secure/open"])
def test_garbage_in_the_place_of_a_share_is_noticed_in_the_sum(federation: Make, phase: str) -> None:
    def forge(phase_: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if (phase_, client) == (phase, "bob"):
            return {name: tensor.random_(0, 256) for name, tensor in tensors.items()}
        return tensors

    made = federation(FedIT(), rounds=1, link=Wire(forge=forge))
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"].startswith("the sum is none of what clients send")
    assert same(outcome.state.weights, made.start().weights)


# What a client refuses of a server.


def sharers(clients: int = 4) -> tuple[list[Sharer], np.ndarray]:
    made = [Sharer(1, CODE, 2, 0.5) for _ in range(clients)]
    return made, np.concatenate([one.keys()["secure:keys"].numpy() for one in made])


def test_what_a_client_refuses_of_a_server() -> None:
    made, keys = sharers()
    two = of_bytes("keys", keys[:2].copy())
    with pytest.raises(BadUpdate, match=r"'keys' must be bytes \[2, 32\]"):
        made[0].deal(of_bytes("keys", keys[:1].copy()) | of_numbers("clients", [4]))
    with pytest.raises(BadUpdate, match="it was asked for 'deal' after 'deal': each step of a round is done once"):
        made[0].deal(two | of_numbers("clients", [4]))
    with pytest.raises(BadUpdate, match="the server names one holder twice"):
        made[1].deal(of_bytes("keys", keys[[0, 0]].copy()) | of_numbers("clients", [4]))
    with pytest.raises(
        BadUpdate, match=r"the server says that \[2\] clients are in the round, fewer than can be summed"
    ):
        made[2].deal(two | of_numbers("clients", [2]))
    with pytest.raises(BadUpdate, match="it has dealt no shares of its upload"):
        made[3].meet({})


def held() -> Sharer:
    """A holder of four shares, of which it could not open the last."""
    made, keys = sharers()
    question = of_bytes("keys", keys[:2].copy()) | of_numbers("clients", [4])
    sealed = np.stack([one.deal(question)["secure:sealed"].numpy()[0] for one in made])
    sealed[3] ^= 1
    answer = made[0].hold(of_bytes("keys", keys) | of_bytes("sealed", sealed))
    assert answer["secure:opened"].tolist() == [[1], [1], [1], [0]]
    return made[0]


@pytest.mark.parametrize(
    ("survivors", "words"),
    [
        ([0, 1], "2 clients survived, fewer than the 3 whose sum may be seen"),
        ([0, 1, 3], "the server asks for shares that it does not hold"),
        ([0, 1, 9], "the server asks for shares that it does not hold"),
        ([2, 1, 0], "'survivors' must name clients in order, each once"),
        ([0, 0, 1, 2], "'survivors' must name clients in order, each once"),
    ],
)
def test_a_holder_opens_no_sum_over_few_and_none_twice(survivors: list[int], words: str) -> None:
    with pytest.raises(BadUpdate, match=words):
        held().open(of_numbers("survivors", survivors) | of_numbers("length", [3]))
    one = held()
    one.open(of_numbers("survivors", [0, 1, 2]) | of_numbers("length", [3]))
    with pytest.raises(BadUpdate, match="it was asked for 'open' after 'open'"):
        one.open(of_numbers("survivors", [0, 1, 2]) | of_numbers("length", [3]))


def test_who_dealt_nothing_holds_nothing() -> None:
    made, keys = sharers()
    with pytest.raises(BadUpdate, match="it was asked for 'hold' after 'keys'"):
        made[0].hold(of_bytes("keys", keys) | of_bytes("sealed", np.zeros((4, 60), np.uint8)))
    # What a holder sealed for another one is no letter to itself.
    one, keys = sharers()
    question = of_bytes("keys", keys[:2].copy()) | of_numbers("clients", [4])
    own = one[0].deal(question)["secure:sealed"].numpy()
    back = of_bytes("keys", keys[:2].copy()) | of_bytes("sealed", own)
    assert one[0].hold(back)["secure:opened"].tolist() == [[1], [0]]
    # What is sealed in one round opens in no other.
    made, keys = sharers()
    late = Sharer(2, CODE, 2, 0.5)
    late._pair = made[1]._pair
    question = of_bytes("keys", keys[1:3].copy()) | of_numbers("clients", [4])
    sealed = made[2].deal(question)["secure:sealed"].numpy()[:1]
    late.deal(question)
    assert late.hold(of_bytes("keys", keys[2:3].copy()) | of_bytes("sealed", sealed))["secure:opened"].tolist() == [[0]]


# Settings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"holders": 0}, "SMPCAdditive holders must be at least 1, but is 0"),
        ({"threshold": 0.4}, "SMPCAdditive threshold must be at least 0.5 and below 1, but is 0.4"),
        ({"bits": 1}, "SMPCAdditive bits must be from 2 to 32, but is 1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SMPCAdditive(**settings)


def test_more_holders_than_clients_are_refused(federation: Make) -> None:
    words = "SMPCAdditive has 5 holders of shares, but the sampler draws 4 of 8 clients on average. Lower holders"
    with pytest.raises(RecipeError, match=words):
        federation(FedIT(), members=crowd(8), sampler=Uniform(count=4), secure=SMPCAdditive(holders=5))
