"""Losses of a language-model head by chunks: cross-entropy's values and gradients, and never all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedfm.core.jobs import Fit
from fedfm.models import Loaded
from fedfm.spaces import LoRA
from fedfm.tasks import CausalLM, Chat
from fedfm.tasks.head import CHUNK, _Chunked, nats
from fedfm.tasks.task import TaskModel
from tests.conftest import FAST, People
from tests.train.test_fused import both, start, view
from tests.train.test_packing import HAND, batch

D, V = 16, 50


def head(bias: bool = False) -> nn.Linear:
    """A frozen one."""
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=bias).requires_grad_(False)


def positions(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ``[S, D]``, words ``[S]``, and what each loss weighs in the total ``[S]``."""
    draw = torch.Generator().manual_seed(count)
    states = 3 * torch.randn(count, D, generator=draw)
    return states, torch.randint(V, (count,), generator=draw), torch.randn(count, generator=draw)


def by_torch(layer: nn.Module, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(layer(states).float(), words, reduction="none")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 44])
def test_losses_and_gradients_are_those_of_cross_entropy(count: int, bias: bool) -> None:
    layer = head(bias)
    states, words, weights = positions(count)
    one, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    got, wanted = nats(layer, one, words), by_torch(layer, other, words)
    assert type(got.grad_fn).__name__ == "_ChunkedBackward"
    assert got.shape == (count,)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(nats(layer, states, words), wanted.detach(), rtol=1e-5, atol=1e-5)


def test_a_loss_by_hand() -> None:
    """Logits log 1, log 2, log 5 for words 0, 1, 2: the second has probability 1/4."""
    layer = nn.Linear(1, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [2.0], [5.0]]).log())
    states = torch.ones(1, 1, requires_grad=True)
    loss = nats(layer, states, torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.3862944)  # log 4
    # The sum over words of (p - [word is the wanted one]) times its weight: (1/8) 0 - (3/4) log 2 + (5/8) log 5.
    assert states.grad is not None
    assert states.grad.item() == pytest.approx(-0.75 * 0.6931472 + 0.625 * 1.6094379)


def test_positions_of_equal_words_count_each() -> None:
    layer = head()
    states = torch.ones(3, D).requires_grad_()
    nats(layer, states, torch.tensor([4, 4, 4])).backward(torch.tensor([1.0, 0.0, -2.0]))
    assert states.grad is not None
    assert states.grad[1].abs().max() == 0
    torch.testing.assert_close(states.grad[2], -2 * states.grad[0])


def test_words_that_are_certain_or_impossible_stay_finite() -> None:
    layer = nn.Linear(1, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    states = torch.tensor([[500.0], [500.0]], requires_grad=True)
    losses = nats(layer, states, torch.tensor([0, 1]))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1000.0]
    assert states.grad is not None
    assert states.grad.flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("count", [5, 2 * CHUNK + 44])
def test_under_bfloat16_losses_and_gradients_are_close(count: int) -> None:
    """bfloat16 has eight bits: logits of either way are the same; gradients differ by roundings, 1 % of the largest."""
    layer = head()
    states, words, weights = positions(count)
    one, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = nats(layer, one, words), by_torch(layer, other, words)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert float((one.grad - other.grad).abs().max()) < 1e-2 * float(other.grad.abs().max())


def test_weights_in_bfloat16_give_gradients_in_bfloat16() -> None:
    layer = head().bfloat16()
    states, words, _ = positions(200)
    one, other = (states.bfloat16().requires_grad_() for _ in range(2))
    nats(layer, one, words).sum().backward()
    by_torch(layer, other, words).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.dtype == torch.bfloat16
    assert float((one.grad - other.grad).abs().max()) < 2e-2 * float(other.grad.abs().max())


class Largest(TorchDispatchMode):
    """Notes the most rows of logits that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(one) and one.dim() == 2 and one.shape[1] == V:
                self.rows = max(self.rows, len(one))
        return out


@contextmanager
def kept() -> Iterator[list[torch.Size]]:
    """Shapes of what is kept for the backward."""
    shapes: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield shapes


def test_logits_are_made_by_the_chunk_and_none_are_kept() -> None:
    layer = head()
    states, words, _ = positions(3 * CHUNK + 7)
    states.requires_grad_()
    with Largest() as largest, kept() as shapes:
        nats(layer, states, words).sum().backward()
    assert largest.rows == CHUNK
    assert shapes == [states.shape]
    with Largest() as largest, torch.no_grad():
        nats(layer, states, words)
    assert largest.rows == CHUNK
    # What is observed is there to be seen: the ordinary way makes them all, and keeps them.
    with Largest() as largest, kept() as shapes:
        by_torch(layer, states, words).sum().backward()
    assert largest.rows == len(states)
    assert (len(states), V) in shapes


class Scaled(nn.Linear):
    """A head that does not give its product as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("kind", ["tuned", "bias", "changed", "no-gradient"])
def test_other_heads_go_the_ordinary_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is tuned, or of another kind, gets the gradients that autograd gives it."""
    monkeypatch.setattr(_Chunked, "forward", None)  # calling it would fail
    layer: nn.Linear = head(bias=True) if kind != "changed" else Scaled(D, V).requires_grad_(False)
    if kind in ("tuned", "bias"):
        (layer.weight if kind == "tuned" else layer.bias).requires_grad_()
    states, words, weights = positions(CHUNK + 9)
    one, other = (states.clone().requires_grad_(kind != "no-gradient") for _ in range(2))
    found = []
    for way, x in ((nats, one), (by_torch, other)):
        losses = way(layer, x, words)
        if kind != "no-gradient":
            (losses * weights).sum().backward()
        found.append([losses.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
    assert len(found[0]) == (2 if kind in ("tuned", "bias") else 1)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    if kind != "no-gradient":
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_a_task_s_loss_is_that_of_the_whole_model(llama: Loaded) -> None:
    """By the head's chunks, and by all the model's logits; gradients, too."""
    given, model = batch(HAND), llama.model
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    found = []
    for task in (TaskModel(model, model.model, model.lm_head), TaskModel(model)):
        losses = CausalLM().losses(task, given)
        losses.total.sum().backward()
        found.append((losses.total.detach(), weight.grad.clone()))
        weight.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert found[0][0].tolist()[4] == 0


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_training_takes_chunks_unless_the_head_is_tuned(
    llama: Loaded, people: People, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    inner = _Chunked.forward

    def forward(ctx: Any, states: torch.Tensor, wanted: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        chunks.append(len(states))
        return inner(ctx, states, wanted, layer)

    monkeypatch.setattr(_Chunked, "forward", staticmethod(forward))
    training = replace(FAST, optim="sgd", learning_rate=0.5, max_steps=3)
    pair = both(llama, people, Chat(), LoRA(r=2, target_modules=targets), training)
    own = start(pair.one, "ann")
    fitted = pair.one.answer(Fit(own), view(people, "ann"))
    assert len(chunks) == (0 if "lm_head" in targets else 3)
    moved = {n for n, t in fitted.tensors.items() if not torch.equal(t, own[n])}
    assert moved == set(own)
