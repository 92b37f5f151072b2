"""The box of what was protected: what it says is what arrived at the link of real rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.local_only import LocalOnly
from fedfm.methods.noisy.nbafl import NbAFL
from fedfm.methods.optim.byrd_saga import ByrdSAGA
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.report.protection import protection
from fedfm.report.read import Run
from fedfm.rounds import Rounds
from fedfm.sample import Poisson
from fedfm.secure.ckks import CKKS
from fedfm.secure.fedml_he import FedMLHE
from fedfm.secure.secagg import SecAgg
from fedfm.secure.securefl import SecureFL
from fedfm.secure.smpc_additive import SMPCAdditive
from fedfm.wire import Clip, DistributedGaussian, Gaussian, LocalGaussian
from tests.conftest import dialogue

Make = Callable[..., Federation]


def box(run: Federation, **recipe: Any) -> dict[str, tuple[str, str, str]]:
    """What they see, protected by, not protected; by who."""
    records = Rounds(run, None, ()).run(False).records
    found = Run("run", "completed", "", records, {}, recipe, "", {}, {})
    return {row[0].text: (row[1].text, row[2].text, row[3].text) for row in protection(found).rows}


def test_of_a_plain_run_the_server_sees_all(federation: Make) -> None:
    found = box(federation(FedAvg()))
    sees, by, left = found["server"]
    assert sees.startswith("each client's upload: 448 values, changes of weights; beside it loss, steps, the number of")
    assert "sums over each client's held-out rows (loss, hits), 3 times" in sees
    assert by == "nothing"
    assert "single rows" in left
    assert found["clients and users"][1] == "nothing"
    assert found["hostile clients"][1] == "nothing but checks of form"
    assert "who listens on the network" not in found


def test_masked_uploads_are_told_from_plain_ones_by_what_arrived(federation: Make) -> None:
    quiet = Evaluation(every=0)
    sees, by, left = box(federation(FedAvg(), secure=SecAgg(), evaluation=quiet))["server"]
    assert sees == "the sum of 3 uploads or more; each of them masked"
    assert by == "secagg: no upload is readable by itself"
    assert "the sum" in left
    sees, by, _ = box(federation(FedAvg(), evaluation=quiet))["server"]
    assert sees.startswith("each client's upload")
    assert by == "nothing"


def test_of_encrypted_uploads_it_is_said_who_has_the_key_and_what_is_left_open(federation: Make) -> None:
    quiet = Evaluation(every=0)
    sees, by, left = box(federation(FedAvg(), secure=CKKS(), evaluation=quiet))["server"]
    assert sees == "the sum of 3 uploads or more; each of them encrypted"
    assert by == "ckks: no upload is readable by itself"
    assert "with one client" in left
    part = federation(FedAvg(), secure=FedMLHE(ratio=0.25), evaluation=quiet)
    sees, by, left = box(part)["server"]
    assert sees == "of each client's upload the part that is not encrypted; beside it the number of its examples"
    assert by == "fedml-he: the most sensitive coordinates are encrypted"
    assert left.startswith("the other coordinates, each client's by itself")


def test_of_shares_it_is_said_who_has_the_others(federation: Make) -> None:
    run = federation(FedAvg(), secure=SMPCAdditive(), evaluation=Evaluation(every=0))
    sees, by, left = box(run)["server"]
    assert sees == "the sum of 3 uploads or more; of each of them one share"
    assert by == "smpc-additive: no upload is readable by itself"
    assert left == "the sum; and all, if the server works with all who hold the other shares"


def test_of_judged_uploads_it_is_said_what_is_told_of_each(federation: Make) -> None:
    public = [dialogue(f"{word}?", word) for word in ("ha", "no", "mm")]
    run = federation(FedAvg(), secure=SecureFL(), evaluation=Evaluation(every=0), public=public)
    found = box(run)
    left = found["server"][2]
    assert found["hostile clients"][1] == "securefl"
    assert "of each upload its trust, and 64 sums of its numbers; all, too, if it works with the dealer" in left


def test_noise_on_the_mean_protects_from_those_who_get_the_mean_and_not_from_the_server(federation: Make) -> None:
    stages = (Clip(0.1), Gaussian(1.0, delta=1e-3))
    found = box(federation(FedAvg(), stages=stages, sampler=Poisson(rate=0.9)))
    assert found["server"][1] == "nothing"
    assert "beside it" not in found["server"][0]  # Metrics and row counts stay away where single uploads are hidden.
    assert found["clients and users"][1].startswith("noise: ε = ")
    assert found["clients and users"][1].endswith("at δ = 0.001 for each client")
    assert found["hostile clients"][1] == "clip"


def test_noise_of_clients_in_a_masked_sum_protects_from_the_server_too(federation: Make) -> None:
    stages = (Clip(0.1), DistributedGaussian(1.0, delta=1e-3))
    run = federation(FedAvg(), stages=stages, secure=SecAgg(), evaluation=Evaluation(every=0))
    _, by, left = box(run)["server"]
    assert "secagg: no upload is readable by itself; noise that clients add, in the sum: ε = " in by
    assert "the sum" not in left


def test_noise_of_clients_is_named_without_an_epsilon(federation: Make) -> None:
    found = box(federation(FedAvg(), stages=(Clip(0.1), LocalGaussian(1.0))))
    assert "no ε is accounted for it" in found["server"][1]


def test_parts_that_a_method_brings_are_named_too(federation: Make) -> None:
    found = box(federation(NbAFL()))
    assert "nbafl: noise that each client adds to its upload (no ε is accounted for it)" in found["server"][1]
    assert box(federation(ByrdSAGA()))["hostile clients"][1] == "geometric-median"


def test_noise_in_training_protects_examples_from_all(federation: Make) -> None:
    found = box(federation(FedAvg(), privacy=DPSGD(noise_multiplier=1.0)))
    assert "for each example" in found["server"][1]
    assert "what a client's rows have in common" in found["server"][2]
    assert found["clients and users"][1].endswith("for each example")


def test_a_guarantee_does_not_count_who_leaves_duplicates_out(federation: Make) -> None:
    private = {"privacy": DPSGD(noise_multiplier=1.0), "evaluation": Evaluation(every=0)}
    assert "deduplicate" not in box(federation(FedAvg(), **private))["clients and users"][2]
    found = box(federation(FedAvg(), **private), data={"deduplicate": "exact"})
    assert "(data.deduplicate), which ε does not count" in found["clients and users"][2]


def test_where_nothing_travels_nothing_is_seen(federation: Make) -> None:
    found = box(federation(LocalOnly(), evaluation=Evaluation(every=0)))
    assert found["clients and users"] == ("nothing of others", "nothing travels", "–")


def test_a_run_without_a_transcript_has_no_box() -> None:
    assert not protection(Run("run", "completed", "", [{"round": 0}, {"round": 1}], {}, {}, "", {}, {})).rows
