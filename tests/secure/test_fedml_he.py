"""Selective encryption: which coordinates, what the server sees of the others, and the same sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tenseal")

from fedfm.core.client import View
from fedfm.core.jobs import Fit, Gradient
from fedfm.core.method import Method
from fedfm.core.traits import Trait
from fedfm.core.update import Member, Tensors, Update
from fedfm.errors import BadUpdate, Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.lora.dp_lora import DPLoRA
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.optim.scaffold import Scaffold
from fedfm.observe import Observer
from fedfm.sample import Poisson, Uniform
from fedfm.secure.ckks import CKKS
from fedfm.secure.fedml_he import FedMLHE
from fedfm.secure.fixed_point import FixedPoint
from fedfm.secure.letters import MARK, of_bytes, of_numbers
from fedfm.secure.selector import Selector, digest, inside, plain_ring, share, top
from fedfm.secure.sensitivity import Sensitivity
from fedfm.train import Fused, Trainer
from fedfm.wire import AdaptiveClip, Clip, Gaussian, LocalGaussian
from tests.conftest import People
from tests.secure.links import Wire
from tests.secure.test_secure_runs import SGD, Half, Losing, Quantised, crowd, same

Make = Callable[..., Federation]
CODE = FixedPoint(24, 1.0, 16384)


@pytest.fixture
def federation(federation: Make) -> Make:
    return lambda method, **changes: federation(
        method, **{"engine": Trainer, "evaluation": Evaluation(every=0), "secure": FedMLHE(), **changes}
    )


@dataclass(frozen=True)
class Keeping(Quantised):
    """The sum in the open, with all uploads kept."""

    uploads: list[list[Update]] = None  # type: ignore[assignment]

    def __call__(self, updates: Any) -> Update:
        self.uploads.append(list(updates))
        return super().__call__(self.uploads[-1])


def opened(federation: Make, method: Method, **changes: Any) -> tuple[Tensors, list[list[Update]]]:
    """The weights of the run whose uploads are quantised and summed in the open, and the uploads of each round."""
    mean = Keeping(uploads=[])
    return federation(method, **{"mean": mean, "secure": None, **changes}).run().state.weights, mean.uploads


def of(wire: Wire, phase: str, round: int, name: str) -> dict[str, Any]:
    """What clients sent in a task, by client."""
    return {c: t[MARK + name] for at, r, c, t in wire.got if (at, r) == (phase, round) and MARK + name in t}


def told(wire: Wire, round: int) -> dict[str, Any]:
    """The masks that clients were told."""
    return {c: t[MARK + "mask"] for at, r, c, t in wire.sent if (at, r) == ("local", round) and MARK + "mask" in t}


class Open(FedMLHE):
    """Nothing is encrypted but the weights, which no recipe can ask for."""

    def __post_init__(self) -> None:
        pass


# The numbers.


@pytest.mark.parametrize(
    ("method", "ratio"), [(FedIT(), 0.1), (FedIT(), 0.6), (FedIT(), 1.0), (Half(), 0.1), (Scaffold(), 0.3)]
)
def test_a_run_is_that_with_the_open_sum_whatever_is_encrypted(federation: Make, method: Method, ratio: float) -> None:
    outcome = federation(method, training=SGD, secure=FedMLHE(ratio=ratio)).run()
    assert same(outcome.state.weights, opened(federation, method, training=SGD)[0])
    note = outcome.records[1]["secure"]
    assert note["ratio"] == ratio
    if type(method) is FedIT:
        assert note["encrypted"] == {0.1: 45, 0.6: 269, 1.0: 448}[ratio]  # of 448


def test_clients_trained_together_are_summed_alike(federation: Make) -> None:
    together = federation(FedIT(), engine=Fused).run().state.weights
    assert same(together, opened(federation, FedIT(), engine=Fused)[0])


def test_all_of_it_is_ckks(federation: Make) -> None:
    whole, ckks = Wire(), Wire()
    one = federation(FedIT(), secure=FedMLHE(ratio=1.0), link=whole).run()
    assert same(one.state.weights, federation(FedIT(), secure=CKKS(), link=ckks).run().state.weights)
    # The same questions, and of uploads the same names and as many texts; no map is asked for.
    assert whole.phases(1) == ckks.phases(1)
    for wire in (whole, ckks):
        uploads = [t for phase, _, _, t in wire.got if phase == "local"]
        assert all(t.keys() == {"secure:cipher", "secure:cipher-sizes"} for t in uploads)
        assert all(len(t["secure:cipher-sizes"]) == 1 for t in uploads)


def test_nothing_of_it_is_the_mean_of_uploads_in_the_open(federation: Make) -> None:
    wire = Wire()
    outcome = federation(FedIT(), secure=Open(ratio=0.0), link=wire, training=SGD).run()
    weights, uploads = opened(federation, FedIT(), training=SGD)
    assert same(outcome.state.weights, weights)
    plain = of(wire, "local", 1, "plain")
    for update in uploads[0]:
        levels = CODE.ring(3).signed(CODE.encode(update, CODE.ring(3)))[:-2] // int(update.weight)
        assert (plain_ring(CODE).signed(plain_ring(CODE).unpack(plain[update.member].numpy())) == levels).all()
    fedavg = federation(FedIT(), secure=None, training=SGD).run().state.weights
    for name, tensor in fedavg.items():
        torch.testing.assert_close(outcome.state.weights[name], tensor, rtol=0, atol=1e-6)


def test_drop_outs_change_nothing_for_the_others(federation: Make) -> None:
    people = crowd(6)
    left = people.only("c0", "c3", "c4", "c5")
    for phase in ("secure/map", "local"):
        wire = Wire(gone={phase: ("c1", "c2")})
        outcome = federation(FedIT(), members=people, rounds=1, link=wire).run()
        assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1)[0])
        assert [d["client"] for d in outcome.records[1]["dropped"]] == ["c1", "c2"]
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(gone={"secure/choose": ("c1", "c2")})).run()
    assert same(outcome.state.weights, opened(federation, FedIT(), members=people, rounds=1)[0])


def test_a_resumed_run_is_bit_equal_and_keeps_the_mask(federation: Make, tmp_path: Path) -> None:
    whole = federation(Half(), rounds=3).run(tmp_path / "whole")
    first, then = Wire(), Wire()
    half = federation(Half(), rounds=3, link=first)

    class Quit(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 1:
                half.stop()

    assert half.run(tmp_path / "half", observers=[Quit()]).status == "stopped"
    resumed = federation(Half(), rounds=3, link=then).run(tmp_path / "half", resume=True)
    assert same(whole.state.weights, resumed.state.weights)
    assert "secure/map" in first.phases(1)
    assert then.phases(2).keys() == {"secure/keys", "secure/deal", "local", "secure/open"}
    assert {m.numpy().tobytes() for m in told(first, 1).values()} == {
        m.numpy().tobytes() for m in told(then, 2).values()
    }


# What the server sees.


def test_the_server_sees_the_coordinates_outside_the_mask_and_no_others(federation: Make) -> None:
    wire = Wire()
    federation(FedIT(), secure=FedMLHE(ratio=0.3), link=wire, rounds=1, training=SGD).run()
    [uploads] = opened(federation, FedIT(), rounds=1, training=SGD)[1]
    values = sum(t.numel() for t in uploads[0].tensors.values())
    masks = {mask.numpy().tobytes() for mask in told(wire, 1).values()}
    chosen = inside(np.frombuffer(masks.pop(), np.uint8), values, share(0.3, values))
    assert not masks
    assert chosen.sum() == share(0.3, values) == -(-3 * values // 10)
    plain, weight, ring = of(wire, "local", 1, "plain"), of(wire, "local", 1, "weight"), plain_ring(CODE)
    names = {phase: set[str]() for phase, *_ in wire.got}
    for phase, _, _, tensors in wire.got:
        names[phase] |= {name.removeprefix(MARK) for name in tensors}
    assert names == {
        "secure/keys": {"keys", "knows"},
        "secure/deal": {"secret", "sealed"},
        "secure/map": {"cipher", "cipher-sizes"},
        "secure/choose": {"mask"},
        "local": {"cipher", "cipher-sizes", "plain", "weight"},
        "secure/open": {"sum"},
    }
    for update in uploads:
        levels = CODE.ring(3).signed(CODE.encode(update, CODE.ring(3)))[:-2] // int(update.weight)
        assert (ring.signed(ring.unpack(plain[update.member].numpy())) == levels[~chosen]).all()
        assert weight[update.member].tolist() == [update.weight]


def test_the_mask_travels_once_to_each_client(federation: Make) -> None:
    wire = Wire()

    class Shifted(Uniform):
        """Three of four, others in each round."""

        def sample(self, ids: Any, round: int, seed: int) -> list[str]:
            return [id for k, id in enumerate(sorted(ids)) if k != round % 4]

        def expected(self, population: int) -> float:
            return 3.0

    outcome = federation(FedIT(), members=crowd(4), rounds=4, link=wire, sampler=Shifted()).run()
    assert [sorted(told(wire, r)) for r in (1, 2, 3, 4)] == [["c0", "c2", "c3"], ["c1"], [], []]
    assert [outcome.records[r]["secure"].get("mapped") for r in (1, 2, 3, 4)] == [3, None, None, None]


def test_ciphertexts_grow_with_the_part_that_is_encrypted() -> None:
    sizes = []
    for ratio in (0.25, 0.5, 1.0):
        made, public = selectors(ratio, values := 64 * 2048)
        made[0].mask = top(np.arange(values), share(ratio, values))
        made[0].deal(public)
        made[0].meet({})
        sent = made[0].lock(Update({"w": torch.zeros(values)}, 3.0))
        sizes.append(sent["secure:cipher"].numel())
        assert sent.get("secure:plain", torch.empty(0, 3)).shape == (values - share(ratio, values), 3)
    # One ciphertext more, for the weight.
    assert sizes[1] / sizes[0] == pytest.approx(33 / 17, rel=0.02)
    assert sizes[2] / sizes[1] == pytest.approx(65 / 33, rel=0.02)


def selectors(ratio: float, values: int, count: int = 3) -> tuple[list[Selector], dict[str, torch.Tensor]]:
    made = [Selector(1, CODE, ratio, None) for _ in range(count)]
    return made, of_bytes("keys", np.concatenate([one.keys()["secure:keys"].numpy() for one in made]))


# What is sensitive.


def test_the_map_by_single_gradients(federation: Make, people: People) -> None:
    """The mean over examples of the size of each one's gradient, at the weights after the client's training."""
    rows = people.rows("bob", "train")
    alone = People({f"row{k}": {"train": [row], "validation": [], "test": []} for k, row in enumerate(rows)})
    together = federation(FedIT(), secure=None)
    start = together.start().weights
    trainer, bob = together.trainer, View(Member("bob", len(rows)), 1, space=together.layout)
    job = Sensitivity(start, train=("lora_B",), like={**start, "c:x.lora_B.weight": torch.zeros(2)}, examples=9)
    found = trainer.answer(job, bob)
    assert found.weight == len(rows)

    trained = trainer.answer(Fit(start, train=("lora_B",), purpose="sensitivity"), bob).tensors
    single = federation(FedIT(), members=alone, secure=None).trainer
    views = [View(Member(f"row{k}", 1), 1) for k in range(len(rows))]
    gradients = [single.answer(Gradient(trained, train=("lora_B",)), view).tensors for view in views]
    by_hand = {name: torch.stack([g[name].abs() for g in gradients]).mean(0) for name in gradients[0]}
    largest = max(float(t.max()) for t in by_hand.values())
    for name, tensor in found.tensors.items():
        if name in by_hand:
            torch.testing.assert_close(tensor, by_hand[name] / largest, rtol=1e-4, atol=1e-6)
        else:  # A is not trained; and what is no tuned tensor counts as most sensitive.
            assert (tensor == (1.0 if ":" in name else 0.0)).all()
    some = trainer.answer(Sensitivity(start, train=("lora_B",), like=start, examples=1), bob)
    assert any(not torch.equal(some.tensors[name], found.tensors[name]) for name in by_hand)


def test_a_control_variate_is_as_sensitive_as_its_weight(federation: Make) -> None:
    made = federation(FedIT(), secure=None)
    start = made.start().weights
    like = {**start, **{f"c:{name}": tensor for name, tensor in start.items()}}
    view = View(Member("ann", 6), 1, space=made.layout)
    found = made.trainer.answer(Sensitivity(start, train=("*",), like=like, examples=2), view).tensors
    assert all(torch.equal(found[name], found[f"c:{name}"]) for name in start)
    # B is zero at the start, but not after training, so A has a gradient, too.
    assert all(float(found[name].max()) > 0 for name in start)


def test_what_is_chosen_holds_more_of_an_upload_than_chance_would(federation: Make) -> None:
    """The part of the squared norm that the server sees of uploads with 30% encrypted: by the map, and at random."""
    wire = Wire()
    federation(FedIT(), secure=FedMLHE(ratio=0.3), link=wire, rounds=1, training=SGD).run()
    [uploads] = opened(federation, FedIT(), rounds=1, training=SGD)[1]
    values = sum(t.numel() for t in uploads[0].tensors.values())
    mask = next(iter(told(wire, 1).values())).numpy()
    chosen = inside(mask, values, share(0.3, values))
    draw = np.random.default_rng(0)
    for update in uploads:
        flat = torch.cat([update.tensors[name].flatten() for name in sorted(update.tensors)]).double().numpy() ** 2
        chance = np.mean([flat[draw.permutation(values) >= chosen.sum()].sum() for _ in range(50)])
        assert flat[~chosen].sum() < 0.5 * chance


def test_masks_by_hand() -> None:
    numbers = np.array([3, 9, 9, 0, 9, -1, 2, 3, 4, 5])
    # The three nines; then 5, 4, and of the equal ones the first.
    assert inside(top(numbers, 3), 10, 3).tolist() == [n == 9 for n in numbers]
    assert inside(top(numbers, 6), 10, 6).nonzero()[0].tolist() == [0, 1, 2, 4, 8, 9]
    assert [share(r, 10) for r in (0.01, 0.1, 0.11, 1.0)] == [1, 1, 2, 10]
    assert digest(None) == bytes(32) != digest(top(numbers, 3))
    for mask in (top(numbers, 4), top(numbers, 3)[:1], np.array([0b11000000, 0b00000001], np.uint8)):
        with pytest.raises(BadUpdate, match="the mask does not mean 3 of 10 coordinates"):
            inside(mask, 10, 3)


# Who lies.


def test_bad_answers_drop_their_senders_by_name(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if (phase, client) == ("secure/keys", "c0"):
            return {name: t for name, t in tensors.items() if not name.endswith("knows")}
        if (phase, client) == ("secure/map", "c1"):
            return {**tensors, MARK + "cipher": tensors[MARK + "cipher"].flip(0)}
        changed = {
            "c2": {"plain": lambda t: t[1:]},
            "c3": {"weight": lambda t: t * 0},
            "c4": {"weight": lambda t: t * 10**6},
            "c5": {"plain": lambda t: torch.tensor([[0, 0, 128]], dtype=torch.uint8).expand_as(t)},
        }
        more = changed.get(client, {}) if phase == "local" else {}
        return {n: more.get(n.removeprefix(MARK), lambda t: t)(t) for n, t in tensors.items()}

    people = crowd(9)
    outcome = federation(FedIT(), members=people, rounds=1, link=Wire(forge=forge)).run()
    reasons = {d["client"]: d["reason"] for d in outcome.records[1]["dropped"]}
    assert reasons.keys() == {"c0", "c1", "c2", "c3", "c4", "c5"}
    assert reasons["c0"] == "'knows' must be bytes [1, 32], but is nothing"
    assert reasons["c1"].startswith("its ciphertexts cannot be read")
    assert reasons["c2"].startswith("'plain' must be bytes [")
    assert reasons["c3"] == "its weight [0] is none from 1 to the 16384 of max_weight"
    assert reasons["c4"].startswith("its weight [")
    assert reasons["c5"] == "a coordinate is beyond the 8388607 that values become at most"
    left = people.only("c6", "c7", "c8")
    assert same(outcome.state.weights, opened(federation, FedIT(), members=left, rounds=1)[0])


def test_two_weights_of_one_client_end_the_round(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        return tensors | {MARK + "weight": torch.tensor([99])} if (phase, client) == ("local", "ann") else tensors

    made = federation(FedIT(), rounds=1, link=Wire(forge=forge))
    outcome = made.run()
    ended = "the weights that were encrypted are not those that were not: a client sent two"
    assert outcome.records[1]["secure"]["ended"] == ended
    assert same(outcome.state.weights, made.start().weights)


def test_who_chooses_another_mask_is_outvoted(federation: Make) -> None:
    def forge(phase: str, round: int, client: str, tensors: dict[str, Any]) -> Tensors:
        if (phase, client) != ("secure/choose", "bob"):
            return tensors
        return {MARK + "mask": torch.from_numpy(top(-np.arange(448), share(0.1, 448)))}

    wire = Wire(forge=forge)
    outcome = federation(FedIT(), rounds=1, link=wire).run()
    assert wire.phases(1)["secure/choose"] == ["bob", "cid", "ann"]
    assert outcome.records[1]["dropped"][0]["client"] == "bob"
    honest = [t[MARK + "mask"] for phase, _, c, t in wire.got if phase == "secure/choose" and c != "bob"]
    assert all(torch.equal(mask, honest[0]) for mask in told(wire, 1).values())


def test_what_a_client_refuses_of_a_server() -> None:
    update = Update({"w": torch.zeros(16)}, 2.0)
    for mask, words in (
        (None, "it does not know which coordinates to encrypt: the server sent no mask"),
        (top(np.arange(16), 1), "the mask does not mean 4 of 16 coordinates"),
        (top(np.arange(24), 4), "the mask does not mean 4 of 16 coordinates"),
    ):
        made, public = selectors(0.25, 16)
        dealt = public | made[0].deal(public) | of_numbers("dealer", [0])
        made[1].meet(dealt if mask is None else dealt | of_bytes("mask", mask))
        with pytest.raises(BadUpdate, match=words):
            made[1].lock(update)
    made, public = selectors(0.25, 16)
    made[0].deal(public)
    with pytest.raises(BadUpdate, match="it was asked for 'choose' after 'deal'"):
        made[0].choose({})


def test_who_cannot_look_at_its_rows_is_dropped(federation: Make) -> None:
    people = crowd(4)
    rows = {i: {s: people.rows(i, s) for s in ("train", "validation", "test")} for i in people.ids}
    rows["c0"]["train"] = []
    record = federation(FedIT(), members=People(rows), rounds=1).run().records[1]
    assert [d["client"] for d in record["dropped"]] == ["c0"]
    assert "no training example" in record["dropped"][0]["reason"]
    assert record["secure"]["mapped"] == record["secure"]["summed"] == 3


def test_too_few_maps_end_the_round(federation: Make) -> None:
    made = federation(FedIT(), rounds=1, link=Wire(gone={"secure/map": ("bob",)}))
    ended = made.run().records[1]["secure"]["ended"]
    assert ended == "2 of 3 updates could be used, but a round needs 3"


def test_who_cannot_train_is_dropped(federation: Make) -> None:
    outcome = federation(Losing(lost=("c0",)), members=crowd(4), rounds=1).run()
    assert outcome.records[1]["dropped"] == [{"client": "c0", "reason": "no rows"}]


# What it goes with.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"stages": (Clip(0.05), Gaussian(0.5)), "sampler": Poisson(rate=1.0)},
            "FedMLHE chooses by clients' rows what is encrypted, and no epsilon of Gaussian counts that choice. Use "
            "secure: ckks, which encrypts everything, or leave Gaussian out",
        ),
        ({"stages": (Clip(0.05), LocalGaussian(std=0.1))}, "and no epsilon of LocalGaussian counts that choice"),
        (
            {"stages": (AdaptiveClip(0.05), Gaussian(0.5)), "sampler": Poisson(rate=1.0)},
            "and no epsilon of Gaussian counts that choice. Use secure: ckks",
        ),
    ],
)
def test_noise_that_would_not_count_the_choice(federation: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Incompatible, match=words):
        federation(FedIT(), **changes)


def test_a_method_that_does_not_say_what_it_uploads_has_no_map(federation: Make) -> None:
    class Silent(FedIT):
        def expects(self, phase: str, message: Tensors) -> None:
            return None

    study = FedMLHE().study("secure/map", Silent())
    assert study
    with pytest.raises(BadUpdate, match="Silent does not say which tensors it uploads in answer to this message"):
        study(View(Member("ann", 6), 1), {})
    assert [FedMLHE().study(phase, FedIT()) for phase in ("secure/keys", "secure/choose", "local")] == [None] * 3
    assert CKKS().study("secure/map", FedIT()) is None
    parties = FedMLHE().parties()
    parties.answer("secure/keys", 1, "ann", {})
    with pytest.raises(BadUpdate, match="it has not looked at its rows, and cannot say what is sensitive"):
        parties.answer("secure/map", 1, "ann", {})


def test_privacy_in_the_clients_is_refused(federation: Make) -> None:
    with pytest.raises(Incompatible, match=r"DPSGD needs ONE_FIT \(.*\), which FedMLHE takes away. Choose another"):
        federation(DPLoRA(noise_multiplier=1.0))


def test_a_method_whose_uploads_change_is_refused(federation: Make) -> None:
    class Changing(FedIT):
        traits = FedIT.traits - {Trait.STEADY}

    with pytest.raises(Incompatible, match=r"FedMLHE needs STEADY .* Use secure: ckks, which encrypts everything"):
        federation(Changing())
    federation(Changing(), secure=CKKS())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0.0}, "FedMLHE ratio must be above 0, as nothing would be encrypted, and at most 1, but is 0.0"),
        ({"ratio": 1.1}, "FedMLHE ratio must be above 0"),
        ({"examples": 0}, "FedMLHE examples must be at least 1, but is 0"),
        ({"openers": 0}, "FedMLHE openers must be at least 1, but is 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        FedMLHE(**settings)
