"""How many clients, and how many tokens, go together: the bounds of memory by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedfm.core.jobs import Fit, Loss
from fedfm.models import Loaded
from fedfm.spaces import Full, LoRA
from fedfm.train import room
from fedfm.train.fused import _Lane
from fedfm.train.room import affordable, budget
from tests.conftest import FAST, People
from tests.train.test_fused import both, fits, same, start, view


class Sized(nn.Linear):
    """1000 weights of four bytes, with a configuration."""

    def __init__(self, **config: Any) -> None:
        super().__init__(10, 100, bias=False)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million bytes beside a model, and two thousand tokens that are enough."""
    monkeypatch.setattr(room, "BESIDE", 10**6)
    monkeypatch.setattr(room, "ENOUGH", 2000)


@pytest.mark.usefixtures("little")
def test_the_budget_is_some_and_as_much_as_the_model() -> None:
    assert budget(Sized()) == 1_004_000
    assert budget(Sized().bfloat16()) == 1_002_000


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        # Three blocks, each with 8 vectors of 10 numbers and 2 of 20, of four bytes: 1440 bytes.
        ({"hidden_size": 10, "intermediate_size": 20, "num_hidden_layers": 3}, 697),
        # A feed-forward layer is four times as wide as the model unless something else is said: 1920 and 640 bytes.
        ({"n_embd": 10, "num_hidden_layers": 3}, 522),
        ({"hidden_size": 10, "intermediate_size": None, "num_hidden_layers": 1}, 1568),
        # More than enough: 7843 would fit.
        ({"hidden_size": 2, "intermediate_size": 8, "num_hidden_layers": 1}, 2000),
        # Twelve blocks of width 768: 589824 bytes.
        ({}, 1),
        # Not even one, but there must be.
        ({"hidden_size": 10**6, "num_hidden_layers": 80}, 1),
    ],
)
def test_tokens_of_a_forward_by_hand(config: dict[str, Any], tokens: int) -> None:
    assert affordable(Sized(**config)) == tokens


@pytest.mark.parametrize(("beside", "group"), [(43008, 3), (43007, 2), (28671, 1), (1 << 28, 32)])
def test_few_clients_go_together_where_the_tuned_tensors_are_large(
    llama: Loaded, people: People, beside: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of two blocks are factors of rank 2 for 32 to 32 and for 32 to 16 numbers: 448 numbers, 1792 bytes. Half
    the budget is for four copies of them, 7168 bytes, for each client."""
    weights = sum(p.nbytes for p in llama.model.parameters())
    monkeypatch.setattr(room, "BESIDE", beside - (weights + 1792))
    pair = both(llama, people, space=LoRA(r=2), tokens=10**6)
    assert sum(p.nbytes for p in pair.one.space.parameters.values()) == 1792
    assert pair.many.group == group
    same(pair, fits(pair, people))
    assert pair.together == ([("fit", min(group, 3))] if group > 1 else [])


def test_the_asked_group_is_an_upper_bound(llama: Loaded, people: People) -> None:
    assert both(llama, people, group=2).many.group == 2


def test_nothing_is_worth_asking_together_where_nothing_can_be_stacked(llama: Loaded, people: People) -> None:
    assert both(llama, people, space=Full()).many.group == 1


def test_tokens_are_what_the_model_affords_unless_given(llama: Loaded, people: People) -> None:
    pair = both(llama, people)
    assert pair.many.tokens == affordable(llama.model)
    pair.one.space.detach()
    assert both(llama, people, tokens=7).many.tokens == 7


def lanes(kind: Any, sizes: list[tuple[int, int]]) -> list[_Lane]:
    """Of so many turns and tokens."""
    none: Any = None
    return [_Lane(at, kind({}), none, [], turns, tokens) for at, (turns, tokens) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("kind", "sizes", "group", "expected"),
    [
        # Just as many tokens as may be.
        pytest.param(Fit, [(1, 10), (1, 30), (1, 20), (1, 40)], 8, [[40, 30, 20, 10]], id="all"),
        # One more is too many, so there are two stacks, of as many clients each; the largest go first.
        pytest.param(Fit, [(1, 11), (1, 30), (1, 20), (1, 40)], 8, [[40, 30], [20, 11]], id="one-more"),
        pytest.param(Fit, [(1, 60), (1, 50), (1, 45)], 8, [[50, 45]], id="two-of-three"),
        pytest.param(Fit, [(1, 170), (1, 50), (1, 50)], 8, [[50, 50]], id="one-too-large"),
        pytest.param(Fit, [(1, 60), (2, 20), (1, 40), (2, 30)], 8, [[30, 20], [60, 40]], id="most-turns-first"),
        # Scoring keeps no activations.
        pytest.param(Loss, [(1, 60), (1, 50), (1, 40), (1, 10)], 8, [[60, 50, 40, 10]], id="scores"),
        pytest.param(
            Loss, [(1, 200), (1, 150), (1, 50), (1, 30), (1, 20)], 8, [[200, 150, 50], [30, 20]], id="many-scores"
        ),
        pytest.param(Loss, [(1, 4), (1, 3), (1, 2), (1, 1)], 2, [[4, 3], [2, 1]], id="two-clients"),
        pytest.param(Loss, [(1, 4), (1, 3), (1, 2), (1, 1)], 3, [[4, 3], [2, 1]], id="three-clients"),
        pytest.param(Fit, [(1, 4)], 8, [], id="alone"),
    ],
)
def test_stacks_of_at_most_a_hundred_tokens(
    llama: Loaded, people: People, kind: Any, sizes: list[tuple[int, int]], group: int, expected: list[list[int]]
) -> None:
    """Of tokens of a forward that trains; one that scores may have four times as many."""
    pair = both(llama, people, tokens=100, group=group)
    assert [[lane.tokens for lane in few] for few in pair.many._stacks(lanes(kind, sizes))] == expected


def test_tokens_of_a_client_s_batch(llama: Loaded, people: People) -> None:
    """The mean length times the rows; batches of two rows for training, of four for scoring."""
    pair = both(llama, people, training=replace(FAST, per_device_eval_batch_size=4))
    tokens = {}
    for c in people.ids:
        mean = sum(map(len, pair.one.encoded(c, "train"))) / len(pair.one.encoded(c, "train"))
        fit = pair.many._lane(0, Fit(start(pair.one, c)), view(people, c))
        score = pair.many._lane(0, Loss(start(pair.one, c), "train"), view(people, c))
        assert fit is not None
        assert score is not None
        assert fit[1].tokens == round(2 * mean)
        assert score[1].tokens == round(min(4, len(people.rows(c, "train"))) * mean)
        tokens[c] = fit[1].tokens
    # The bound that two clients just reach keeps the third out, in training; scoring may have four times as many.
    two = sum(sorted(tokens.values())[:2])
    pair.many.tokens = two
    asked = fits(pair, people)
    same(pair, [*asked, *((Loss(job.tensors, "test"), client) for job, client in asked)])
    assert pair.together == [("fit", 2), ("loss", 3)]


@pytest.mark.usefixtures("little")
def test_on_a_gpu_the_budget_is_half_of_what_the_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tokens are bounded by memory alone."""

    class Remote(Sized):
        """As if it were on a GPU of so many bytes."""

        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(nbytes=4000, device=torch.device("cuda"))])

    for total, expected in ((5_764_000, 2_880_000), (2_002_000, 10**6)):
        about = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert budget(Remote()) == expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=5_764_000))
    assert affordable(Remote(hidden_size=10, intermediate_size=20, num_hidden_layers=1)) == 2_880_000 // 480
