"""pFedPG: prompts made on the server for each client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedfm.core import trees
from fedfm.core.mean import WeightedMean
from fedfm.core.space import Layout
from fedfm.core.traits import Trait
from fedfm.core.update import Member, Update
from fedfm.errors import Incompatible, RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.prompt.pfedpg import GeneratorState, PFedPG, generate
from fedfm.rules import Add
from fedfm.spaces import Prompt
from fedfm.tasks import Classify
from tests.conftest import FAST, People

NAME = "prompt_embeddings"


def layout(rows: int = 3, width: int = 4) -> Layout:
    draw = torch.Generator().manual_seed(5)
    initial = {NAME: torch.randn(rows, width, generator=draw), "base_model.classifier.weight": torch.zeros(2, width)}
    return Layout(initial, clients=2, seed=0)


def change(client: str, value: torch.Tensor, weight: float = 1.0) -> Update:
    return Update({NAME: value}, weight, member=client)


def stepped(method: PFedPG, state: Any, *updates: Update) -> GeneratorState:
    new = method.apply(state, method.combine(state, updates, WeightedMean()), Add())
    assert isinstance(new, GeneratorState)
    return new


def test_the_prompt_by_hand() -> None:
    # D = 1, L = 2: base (1, 2), descriptor (0, 1), all weights 1 but out = 10. Scores of row one are 0, 0, so it takes
    # the mean of the values (1, 2): 1 + 10 * 1.5 = 16. Row two has scores 1, 2: weights 0.26894 and 0.73106, so
    # 2 + 10 * 1.73106 = 19.3106.
    one = torch.ones(1, 1)
    weights = {"base": torch.tensor([[1.0], [2.0]]), "query": one, "key": one, "value": one, "out": 10 * one}
    prompt = generate(weights, torch.tensor([[0.0], [1.0]]))
    assert prompt.flatten().tolist() == pytest.approx([16.0, 19.3106], abs=1e-4)


def test_the_server_steps_along_the_gradient_of_the_returned_changes() -> None:
    method = PFedPG(server_learning_rate=1e-3)
    state = method.start(layout())
    draw = torch.Generator().manual_seed(2)
    changes = {i: torch.randn(3, 4, generator=draw).double() for i in ("ann", "bob")}
    new = stepped(method, state, *(change(i, c.float()) for i, c in changes.items()))

    def value(weights: dict[str, torch.Tensor], descriptors: dict[str, torch.Tensor]) -> float:
        return sum(float((generate(weights, descriptors[i]) * c).sum()) for i, c in changes.items())

    weights = {n: t.double() for n, t in state.weights.items()}
    descriptors = {i: state.descriptor(i).double() for i in changes}
    for group, moved in ((weights, new.weights), (descriptors, {i: new.descriptor(i) for i in changes})):
        for name, tensor in group.items():
            got = (moved[name].double() - tensor) / 1e-3
            for place in ((0, 0), (2, 1)):  # finite differences, two entries of each tensor
                kept, h = tensor[place].item(), 1e-5
                tensor[place] = kept + h
                above = value(weights, descriptors)
                tensor[place] = kept - h
                slope = (above - value(weights, descriptors)) / (2 * h)
                tensor[place] = kept
                assert got[place].item() == pytest.approx(slope, rel=2e-3, abs=2e-3), (name, place)


def test_a_step_moves_the_prompt_to_where_its_client_went() -> None:
    method = PFedPG(server_learning_rate=1e-3)
    state, wish = method.start(layout()), torch.ones(3, 4)
    before, after = (
        s.weights and method.message(s, Member("ann", 1))[NAME]
        for s in (state, stepped(method, state, change("ann", wish)))
    )
    assert float(((after - before) * wish).sum()) > 0


def test_no_change_from_any_client_leaves_the_server_as_it_is() -> None:
    method = PFedPG()
    state = method.start(layout())
    new = stepped(method, state, change("ann", torch.zeros(3, 4)), change("bob", torch.zeros(3, 4)))
    assert all(torch.equal(new.weights[n], t) for n, t in state.weights.items())
    assert all(torch.equal(new.descriptor(i), state.descriptor(i)) for i in ("ann", "bob"))


def test_two_clients_receive_different_prompts_and_only_who_took_part_gets_another_descriptor() -> None:
    method = PFedPG()
    state = method.start(layout())
    ann, bob = (method.message(state, Member(i, 1)) for i in ("ann", "bob"))
    assert set(ann) == {NAME}
    assert not torch.allclose(ann[NAME], bob[NAME])
    new = stepped(method, state, change("ann", torch.ones(3, 4)))
    assert list(new.descriptors) == ["client:ann"]
    assert not torch.equal(new.descriptor("ann"), state.descriptor("ann"))
    assert torch.equal(new.descriptor("bob"), state.descriptor("bob"))
    # With equal descriptors, prompts are equal.
    same = GeneratorState(state.weights, descriptors=dict.fromkeys(("client:ann", "client:bob"), torch.ones(3, 4)))
    assert torch.equal(*(method.message(same, Member(i, 1))[NAME] for i in ("ann", "bob")))


def test_changes_are_summed_not_averaged_and_weights_play_no_part() -> None:
    method = PFedPG()
    state, wish = method.start(layout()), torch.ones(3, 4)
    updates = [change("ann", wish, 1.0), change("bob", wish, 99.0)]
    both = method.combine(state, updates, WeightedMean()).tensors
    each = [method.combine(state, [u], WeightedMean()).tensors for u in updates]
    for name in state.weights:
        torch.testing.assert_close(both[name], each[0][name] + each[1][name])
    assert Trait.LINEAR not in method.traits


LETTERS = {"ann": (6, 0), "bob": (3, 1), "cid": (4, 2)}


@pytest.fixture
def classes(bert_folder: Path) -> Any:
    """Makes a federation of the tiny BERT whose clients have one class each."""

    def make(**changes: Any) -> Federation:
        def rows(n: int, label: int) -> list[dict[str, Any]]:
            return [{"text": "abc"[label] * (i + 2), "label": label} for i in range(n)]

        data = {i: {"train": rows(n, k), "validation": rows(2, k), "test": rows(2, k)} for i, (n, k) in LETTERS.items()}
        settings = {"space": Prompt(4), "training": FAST, "rounds": 2, "evaluation": Evaluation(every=1), **changes}
        return Federation(str(bert_folder), PFedPG(), People(data), Classify(), load={"num_labels": 3}, **settings)

    return make


def test_a_run_keeps_heads_with_their_clients_and_sends_prompts_alone(classes: Any, tmp_path: Path) -> None:
    outcome = classes().run(tmp_path / "run")
    for client in LETTERS:
        kept = load_file(tmp_path / f"run/clients/{client}/00000002.safetensors")
        assert set(kept) == {"base_model.classifier.weight", "base_model.classifier.bias"}
    assert sorted(outcome.state.descriptors) == ["client:ann", "client:bob", "client:cid"]
    loss = [r["train_loss"] for r in outcome.records[1:]]
    assert loss[1] < loss[0]


def test_an_upload_has_the_size_of_the_prompt(classes: Any) -> None:
    from fedfm.core.client import View, work

    made = classes()
    state, member = made.start(), made.plan.members.member("ann")
    client = View(member, 1, space=made.layout)
    update = work(made.method, "local", client, made.method.message(state, member), made.trainer.answer)
    assert {n: t.shape for n, t in update.tensors.items()} == {NAME: (4, 32)}
    assert trees.nbytes(update.tensors) == 4 * 32 * 4
    assert client.kept is not None
    assert not any(NAME in name for name in client.kept)


def test_a_resumed_run_is_equal_bit_for_bit(classes: Any, tmp_path: Path) -> None:
    whole = classes(rounds=3).run(tmp_path / "whole")
    classes(rounds=2).run(tmp_path / "cut")
    (tmp_path / "cut/status.json").unlink()
    resumed = classes(rounds=3).run(tmp_path / "cut", resume=True)
    for one, other in (
        (whole.state.weights, resumed.state.weights),
        (whole.state.descriptors, resumed.state.descriptors),
    ):
        assert list(one) == list(other)
        assert all(torch.equal(other[n], t) for n, t in one.items())


def test_there_is_no_global_model() -> None:
    method = PFedPG()
    assert method.result(method.start(layout()), layout()) == {}


def test_settings(federation: Any) -> None:
    with pytest.raises(RecipeError, match="server_learning_rate must be above 0 and finite, but is 0"):
        PFedPG(server_learning_rate=0)
    with pytest.raises(Incompatible, match="PFedPG is defined on the task classify"):
        federation(PFedPG(), space=Prompt(2))
