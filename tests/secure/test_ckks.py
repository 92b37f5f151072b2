"""Encrypted uploads: the numbers, the dropped, the liars, what the server gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tenseal")

from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate, FedfmError, Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.links.inprocess import InProcess
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.observe import Observer
from fedfm.robust.krum import Krum
from fedfm.sample import Poisson, Uniform
from fedfm.schedule.buffered import Buffered
from fedfm.secure.cipher import Adder, Parameters, Secret
from fedfm.secure.ckks import CKKS
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.holder import Holder
from fedfm.secure.letters import MARK, of_bytes, of_numbers, of_texts
from fedfm.secure.secagg import SecAgg
from fedfm.secure.secure import Secure
from fedfm.store.clients import ClientStore
from fedfm.train import Fused, Trainer
from fedfm.wire import QSGD, Clip, Gaussian, LocalGaussian, TopK
from fedfm.wire.stage import Sender
from tests.secure.links import Wire
from tests.secure.test_secure_runs import SGD, Half, Losing, Quantised, crowd, same

Make = Callable[..., Federation]
CODE = FixedPoint(24, 1.0, 16384)


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method, **{"engine": Trainer, "evaluation": Evaluation(every=0), "secure": CKKS(), **changes}
    )


def opened(federation: Make, method: Method, **changes: Any) -> Tensors:
    """The weights of the run whose uploads are quantised and summed in the open."""
    return federation(method, **{"mean": Quantised(), "secure": None, **changes}).run().state.weights


# The numbers.


@pytest.mark.parametrize("method", [FedIT(), FedAvg(weighting="clients"), Half(), Scaffold()], ids=lambda m: m.id)
def test_a_run_is_that_with_the_open_sum_of_the_same_integers(federation: Make, method: Method) -> None:
    outcome = federation(method, training=SGD).run()
    assert same(outcome.state.weights, opened(federation, method, training=SGD))
    plain = federation(method, training=SGD, secure=None).run().state.weights
    for name, tensor in plain.items():
        torch.testing.assert_close(outcome.state.weights[name], tensor, rtol=0, atol=1e-6)
    masked = federation(method, training=SGD, secure=SecAgg(threshold=0.5)).run().state.weights
    assert same(outcome.state.weights, masked)


def test_clients_trained_together_are_summed_alike(federation: Make) -> None:
    together = federation(FedIT(), engine=Fused).run().state.weights
    assert same(together, opened(federation, FedIT(), engine=Fused))


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
    lines = (tmp_path / "half/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["secure"]["summed"] == 3


# Who drops out, and who lies.


@pytest.mark.parametrize("phase", ["secure/keys", "secure/deal", "local", "secure/open"])
def test_whoever_drops_out_when_the_run_is_that_of_the_others(federation: Make, phase: str) -> None:
    people = crowd(6)
    # In round 1 the second client is the first to deal and to open.
    lost = ("c1", "c2")
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(gone={phase: lost})).run()
    left = people if phase == "secure/open" else people.only("c0", "c3", "c4", "c5")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))
    record = outcome.records[1]
    dropped = {d["client"]: d["reason"] for d in record["dropped"]}
    if phase == "secure/open":
        assert dropped == dict.fromkeys(lost, "gone; its upload is in the sum")
        assert (record["secure"]["summed"], record["secure"]["opened"]) == (6, 2)
    else:
        assert dropped == dict.fromkeys(lost, "gone")
        assert record["secure"]["summed"] == 4
        assert sorted(record["participants"]) == ["c0", "c3", "c4", "c5"]
    if phase == "secure/deal":
        assert record["secure"]["dealer"] == "c3"


def test_dealing_and_opening_go_round(federation: Make) -> None:
    wire = Wire()
    outcome = federation(FedIT(), members=crowd(4), rounds=5, link=wire).run()
    assert [r["secure"]["dealer"] for r in outcome.records[1:]] == ["c1", "c2", "c3", "c0", "c1"]
    assert [wire.phases(r)["secure/open"] for r in (1, 3)] == [["c1", "c2"], ["c0", "c3"]]


@pytest.mark.parametrize(
    ("phase", "lost", "words"),
    [
        ("secure/keys", 2, "2 of 4 clients sent keys, fewer than 3"),
        ("secure/deal", 4, "none of the clients dealt a key of the round"),
        ("local", 2, "2 of 4 updates could be used, but a round needs 3"),
        ("secure/open", 3, "1 of 4 clients opened the sum, fewer than 2; the last: gone; its upload is in the sum"),
    ],
)
def test_with_too_few_left_the_round_does_not_count(federation: Make, phase: str, lost: int, words: str) -> None:
    gone = tuple(f"c{k}" for k in (1, 2, 3, 0)[:lost])
    made = federation(Half(), members=crowd(4), rounds=1, link=Wire(gone={phase: gone}))
    outcome = made.run()
    assert outcome.records[1]["secure"]["ended"] == words
    assert same(outcome.state.weights, made.start().weights)


def test_who_cannot_train_is_dropped(federation: Make) -> None:
    people = crowd(4)
    outcome = federation(Losing(lost=("c0",)), members=people, rounds=1).run()
    assert same(outcome.state.weights, opened(federation, FedIT(), members=people.only("c1", "c2", "c3"), rounds=1))
    assert outcome.records[1]["dropped"] == [{"client": "c0", "reason": "no rows"}]


def test_bad_answers_drop_their_senders_by_name(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if (phase, client) == ("secure/keys", "c0"):
            return {}
        if (phase, client) == ("secure/deal", "c2"):  # the second of those who sent keys
            return {**tensors, MARK + "sealed": tensors[MARK + "sealed"][1:]}
        if phase == "local":
            texts = tensors[MARK + "cipher"], tensors[MARK + "cipher-sizes"]
            if client == "c3":
                return {**tensors, MARK + "cipher": texts[0][:-7], MARK + "cipher-sizes": texts[1] - 7}
            if client == "c4":
                return {**tensors, MARK + "cipher-sizes": texts[1] + 1}
            if client == "c5":
                return {MARK + "cipher": texts[0].repeat(9), MARK + "cipher-sizes": texts[1] * 9}
            if client == "c6":
                return {"w": torch.zeros(3)}
        return tensors

    people = crowd(10)
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(forge=forge)).run()
    record = outcome.records[1]
    reasons = {d["client"]: d["reason"] for d in record["dropped"]}
    assert reasons.keys() == {"c0", "c2", "c3", "c4", "c5", "c6"}
    assert reasons["c0"] == "'keys' must be bytes [1, 32], but is nothing"
    assert reasons["c2"] == "'sealed' must be bytes [9, 60], but is torch.uint8 [8, 60]"
    assert reasons["c3"].startswith("its ciphertexts cannot be read: ")
    assert reasons["c4"].startswith("'cipher' must be bytes [")
    assert reasons["c5"].startswith("'cipher' must be 1 texts of up to ")
    assert reasons["c6"] == "'cipher-sizes' must be whole numbers of at least 0"
    left = people.only("c1", "c7", "c8", "c9")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))


def test_a_public_key_that_is_none_drops_its_owner_alone(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        return {MARK + "keys": tensors[MARK + "keys"] * 0} if (phase, client) == ("secure/keys", "c0") else tensors

    people = crowd(4)
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(forge=forge)).run()
    assert [d["client"] for d in outcome.records[1]["dropped"]] == ["c0"]
    assert same(outcome.state.weights, opened(federation, FedIT(), members=people.only("c1", "c2", "c3"), rounds=1))


def test_two_clients_with_one_key_are_not_let_in(federation: Make) -> None:
    first: list[Tensors] = []

    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if phase != "secure/keys" or client not in ("c0", "c3"):
            return tensors
        first.append(tensors)
        return first[0]

    people = crowd(5)
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(forge=forge)).run()
    assert outcome.records[1]["dropped"] == [{"client": "c3", "reason": "its public key is another client's"}]
    left = people.only("c0", "c1", "c2", "c4")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1))


def test_a_ciphertext_under_another_key_is_noticed_when_opened(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if (phase, client) != ("local", "ann"):
            return tensors
        return of_texts("cipher", Secret(Parameters.of(CODE.largest(3), 3)).encrypt(np.zeros(450, np.int64)))

    made = federation(FedIT(), rounds=1, link=Wire(forge=forge))
    outcome = made.run()
    ended = outcome.records[1]["secure"]["ended"]
    assert ended.startswith(
        "0 of 3 clients opened the sum, fewer than 2; the last: what it opened is no sum of integers"
    )
    assert same(outcome.state.weights, made.start().weights)


def test_a_sum_that_no_clients_could_send_ends_the_round(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if phase != "secure/open":
            return tensors
        return {MARK + "sum": torch.full_like(tensors[MARK + "sum"], 100)}

    record = federation(FedIT(), rounds=1, link=Wire(forge=forge)).run().records[1]
    assert record["secure"]["ended"].startswith("the sum is none of what clients send")


def test_who_opens_the_sum_wrongly_is_outvoted_and_named(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        return {MARK + "sum": tensors[MARK + "sum"] ^ 1} if (phase, client) == ("secure/open", "bob") else tensors

    wire = Wire(forge=forge)
    outcome = federation(FedIT(), link=wire).run()
    assert same(outcome.state.weights, opened(federation, FedIT()))
    reason = "it opened the sum otherwise than most did; its upload is in the sum"
    assert outcome.records[1]["dropped"] == [{"client": "bob", "reason": reason}]
    assert wire.phases(1)["secure/open"] == ["bob", "cid", "ann"]
    # In round 2 the first two to be asked are cid and ann, who agree.
    assert wire.phases(2)["secure/open"] == ["ann", "cid"]
    assert outcome.records[2]["dropped"] == []


def test_without_a_majority_the_round_ends(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        return {MARK + "sum": tensors[MARK + "sum"] ^ ord(client[0])} if phase == "secure/open" else tensors

    record = federation(FedIT(), rounds=1, link=Wire(forge=forge)).run().records[1]
    assert record["secure"]["ended"] == "3 clients opened the sum, and no answer is that of most of them"


# What the server gets.


def test_nothing_but_ciphertexts_reaches_the_server(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adders: list[Adder] = []
    made = Adder.__init__

    def noted(self: Adder, *arguments: Any) -> None:
        made(self, *arguments)
        adders.append(self)

    monkeypatch.setattr(Adder, "__init__", noted)
    wire = Wire()
    outcome = federation(FedIT(), link=wire).run()
    names = {phase: set[str]() for phase, *_ in wire.got}
    for phase, _, _, tensors in wire.got:
        names[phase] |= tensors.keys()
    assert names == {
        "secure/keys": {"secure:keys"},
        "secure/deal": {"secure:secret", "secure:sealed"},
        "local": {"secure:cipher", "secure:cipher-sizes"},
        "secure/open": {"secure:sum"},
    }
    assert len(adders) == 2
    assert not any(adder.context.is_private() for adder in adders)
    # The key is sealed: what passes the server is no key.
    [secret] = [t["secure:secret"] for phase, r, _, t in wire.got if (phase, r) == ("secure/deal", 1)]
    with pytest.raises(BadUpdate, match="key of the round"):
        Secret(adders[0].parameters, secret.numpy().tobytes())
    with pytest.raises(BadUpdate, match="key of the round"):
        Secret(adders[0].parameters, secret.numpy().tobytes()[12:-16])
    for record in outcome.records[1:]:
        assert record["train_loss"] is None
        assert all(p.keys() <= {"seconds", "steps", "bytes_up", "memory"} for p in record["participants"].values())
        note = record["secure"]
        assert note.items() >= {"kind": "ckks", "asked": 3, "summed": 3, "opened": 2, "step": CODE.step}.items()
        assert note["expansion"] == pytest.approx(note["bytes_per_value"] / 4, abs=0.05)


def test_all_keys_are_new_in_each_round(federation: Make) -> None:
    wire = Wire()
    federation(FedIT(), link=wire).run()
    keys = [t["secure:keys"].numpy().tobytes() for phase, _, _, t in wire.got if phase == "secure/keys"]
    assert len(set(keys)) == 6
    secrets = [t["secure:secret"].numpy().tobytes() for phase, _, _, t in wire.got if phase == "secure/deal"]
    assert len(set(secrets)) == 2


def test_a_client_never_sends_an_upload_as_it_is(federation: Make) -> None:
    made = federation(FedIT())
    link = InProcess(made.method, made.trainer, ClientStore(), **made.shared)
    asked = {made.plan.members.member("ann"): made.start().weights}

    def refused() -> str:
        [reply] = link.ask("local", 1, asked)
        assert reply.update is None
        return reply.reason

    why = "it has no keys for secure aggregation in round 1: it was not asked for any, or was restarted"
    assert refused() == why
    assert [r.update is None for r in link.ask("secure/keys", 1, {member: {} for member in asked})] == [False]
    assert refused() == "'keys' must be bytes [-1, 32], but is nothing"
    assert refused() == "it was asked for 'meet' after 'meet': each step of a round is done once, in order"


@pytest.mark.parametrize("secure", [CKKS(), SecAgg(threshold=0.5)], ids=lambda part: part.id)
def test_secrets_are_forgotten_with_the_next_round(secure: Secure) -> None:
    parties = secure.parties()
    for round, client in ((1, "a"), (1, "b"), (2, "b")):
        parties.answer("secure/keys", round, client, {})
    assert parties.halves.keys() == {"b"}
    with pytest.raises(BadUpdate, match="it has no keys for secure aggregation in round 1"):
        parties.half(1, "a")


def test_a_ciphertext_costs_about_eight_times_float32() -> None:
    for clients, code, most in ((3, CODE, 8.2), (100, CODE, 9.2), (100, FixedPoint(24, 1.0, 1), 7.4)):
        own = Parameters.of(code.largest(clients), clients)
        texts = Secret(own).encrypt(np.arange(4 * own.slots))
        assert most - 1 < sum(map(len, texts)) / (16 * own.slots) < most


# A client's half.


def holders(count: int = 3, round: int = 1) -> tuple[list[Holder], dict[str, torch.Tensor]]:
    """Clients, and what the server tells them of each other."""
    made = [Holder(round, CODE) for _ in range(count)]
    return made, of_bytes("keys", np.concatenate([one.keys()["secure:keys"].numpy() for one in made]))


def update(value: float, weight: float = 2.0) -> Update:
    return Update({"w": torch.full((5,), value)}, weight)


def test_a_round_without_links() -> None:
    made, public = holders()
    dealt = public | made[1].deal(public) | of_numbers("dealer", [1])
    assert [one.meet({**dealt, "w": torch.ones(1)}).keys() for one in made] == [{"w"}] * 3
    adder = Adder(made[0].parameters, 7)
    for one, value in zip(made, (0.5, -0.25, 1.0), strict=True):
        sizes, whole = (one_of := one.lock(update(value)))["secure:cipher-sizes"].tolist(), one_of["secure:cipher"]
        assert len(sizes) == 1
        adder.add([whole.numpy().tobytes()])
    ring = CODE.ring(3)
    answers = [one.open(of_texts("cipher", adder.texts()))["secure:sum"].numpy() for one in made]
    assert all((answer == answers[0]).all() for answer in answers)
    mean, clamped = CODE.decode(ring.signed(ring.unpack(answers[0])), 3, {"w": torch.zeros(5)}, Kind.DELTA)
    assert clamped == 0
    torch.testing.assert_close(mean.tensors["w"], torch.full((5,), 1.25 / 3), rtol=0, atol=2e-7)
    with pytest.raises(BadUpdate, match="it was asked for 'open' after 'open': each step of a round is done once"):
        made[0].open({})


def test_what_a_client_refuses_of_a_server() -> None:
    made, public = holders()
    keys = public["secure:keys"].numpy()
    with pytest.raises(BadUpdate, match="list of keys leaves this client's out, or has one of them twice"):
        made[0].deal(of_bytes("keys", keys[1:].copy()))
    with pytest.raises(BadUpdate, match="it was asked for 'deal' after 'deal'"):
        made[0].deal(public)
    with pytest.raises(BadUpdate, match="list of keys leaves this client's out, or has one of them twice"):
        made[1].deal(of_bytes("keys", keys[[0, 1, 1]].copy()))
    made, public = holders(2)
    with pytest.raises(BadUpdate, match="the server names 2 clients, fewer than 3 or more than can be summed"):
        made[0].deal(public)
    made, public = holders()
    with pytest.raises(BadUpdate, match="it was asked for 'open' after 'keys'"):
        made[2].open(of_texts("cipher", [b"x"]))
    with pytest.raises(BadUpdate, match="it has no key of the round"):
        made[2].lock(update(0.5))
    dealt = made[0].deal(public) | public
    with pytest.raises(BadUpdate, match="'dealer' must be whole numbers of at least 0"):
        made[1].meet(dealt)
    made, public = holders()
    dealt = made[0].deal(public) | public
    with pytest.raises(BadUpdate, match="the server does not say who dealt the key of the round"):
        made[1].meet(dealt | of_numbers("dealer", [3]))
    with pytest.raises(BadUpdate, match="what was sealed for it cannot be opened"):
        made[2].meet(dealt | of_numbers("dealer", [1]))


def test_a_key_of_the_round_that_was_changed_is_refused() -> None:
    made, public = holders()
    dealt = made[0].deal(public) | public | of_numbers("dealer", [0])
    spoilt = {**dealt, "secure:secret": dealt["secure:secret"].clone()}
    spoilt["secure:secret"][50] ^= 1
    with pytest.raises(BadUpdate, match="what was sealed for it cannot be opened"):
        made[1].meet(spoilt)
    # What was sealed for one opens nothing for another, and nothing in another round.
    rows = dealt["secure:sealed"].numpy()
    with pytest.raises(BadUpdate, match="what was sealed for it cannot be opened"):
        made[2].meet({**dealt, **of_bytes("sealed", rows[[0, 2, 1]].copy())})
    late = Holder(2, CODE)
    late._pair = made[1]._pair
    with pytest.raises(BadUpdate, match="what was sealed for it cannot be opened"):
        late.meet(dealt)
    same_round = Holder(1, CODE)
    same_round._pair = made[1]._pair
    same_round.meet(dealt)


# What it goes with.


def test_clip_and_central_noise_compose(federation: Make) -> None:
    stages, everyone = (Clip(0.05), Gaussian(0.5)), Poisson(rate=1.0)
    secure = CKKS(max_value=0.05, max_weight=1)
    unseen = federation(FedIT(), stages=stages, secure=secure, sampler=everyone).run()
    code = Quantised(code=FixedPoint(24, 0.05, 1))
    assert same(unseen.state.weights, opened(federation, FedIT(), stages=stages, mean=code, sampler=everyone))


def test_clients_may_each_add_a_share_of_the_noise(federation: Make) -> None:
    """What no server has to be trusted to add: nobody sees an upload with its share of the noise alone."""
    stages = (Clip(0.05), LocalGaussian(std=0.05 / 3**0.5))
    secure = CKKS(max_value=0.5, max_weight=1)
    unseen = federation(FedIT(), stages=stages, secure=secure).run()
    assert unseen.records[1]["secure"]["clamped"] == 0.0
    assert same(
        unseen.state.weights, opened(federation, FedIT(), stages=stages, mean=Quantised(code=secure.fixed_point))
    )


def test_shares_of_noise_add_up_to_that_of_the_sum() -> None:
    """$z S$ for ten clients who each add $z S / \\sqrt{10}$, here to nothing at all."""
    z, bound, count, length = 1.5, 0.2, 10, 20_000
    code = CKKS(max_value=1.0, max_weight=1).fixed_point
    own = Parameters.of(code.largest(count), count)
    secret, adder, ring = Secret(own), Adder(own, length + 2), code.ring(count)
    for client in range(count):
        sender = Sender(torch.Generator().manual_seed(client), {})
        sent = LocalGaussian(std=z * bound / count**0.5).send(Update({"w": torch.zeros(length)}), sender)
        adder.add(secret.encrypt(ring.signed(code.encode(sent, ring))))
    mean, _ = code.decode(secret.decrypt(adder.texts(), length + 2), count, {"w": torch.zeros(length)}, Kind.DELTA)
    assert float((mean.tensors["w"] * count).var()) == pytest.approx((z * bound) ** 2, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"screens": (Krum(hostile=0),)}, r"Krum needs VISIBLE \(.*\), which CKKS takes away\. Bound uploads"),
        ({"schedule": Buffered(buffer=2)}, r"Buffered needs VISIBLE \(.*\), which CKKS takes away"),
        ({"stages": (TopK(fraction=0.5),)}, r"CKKS needs DENSE \(.*\), which TopK takes away\. All coordinates"),
        ({"stages": (QSGD(),)}, "CKKS sums numbers, but QSGD packs them into another form. Leave it out"),
        ({"sampler": Uniform(count=2)}, "CKKS needs at least 3 clients in a round, but the sampler draws 2 of 3"),
        (
            {"members": crowd(1200)},
            "CKKS: a sum over 1200 clients of values of 24 bits with weights up to 16384 takes 48 bits, more than the "
            "47 that are exact under encryption. Lower bits or max_weight",
        ),
    ],
    ids=["screen", "buffered", "topk", "qsgd", "two", "many"],
)
def test_what_it_does_not_go_with(federation: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        federation(FedIT(), **changes)


@pytest.mark.parametrize("trait", [Trait.LINEAR, Trait.ALIGNED, Trait.DENSE, Trait.ONE_ASK])
def test_what_it_needs_of_a_method(federation: Make, trait: Trait) -> None:
    class Lacks(FedIT):
        traits = FedIT.traits - {trait}

    with pytest.raises(Incompatible, match=rf"CKKS needs {trait.name} \(.*\), which Lacks does not promise"):
        federation(Lacks())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "CKKS bits must be from 2 to 32, but is 1"),
        ({"max_value": 0.0}, "CKKS max_value must be above 0 and finite"),
        ({"max_weight": 0}, "CKKS max_weight must be at least 1, but is 0"),
        ({"openers": 0}, "CKKS openers must be at least 1, but is 0"),
        (
            {"bits": 32, "max_weight": 2**16},
            "CKKS: a sum over 3 clients of values of 32 bits with weights up to 65536 takes 49 bits, more than the",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    if settings == {"bits": 32}:
        settings = {"bits": 32, "max_weight": 2**16}
        words = (
            "CKKS: a sum over 3 clients of values of 32 bits with weights up to 65536 takes 49 bits, more than the 47"
        )
    with pytest.raises(RecipeError, match=words):
        CKKS(**settings)


def test_a_method_that_does_not_say_what_it_uploads(federation: Make) -> None:
    class Silent(FedIT):
        def expects(self, phase: str, message: Tensors) -> None:
            return None

    with pytest.raises(FedfmError, match="CKKS must know which tensors clients upload, and Silent does not say so"):
        federation(Silent()).run()
