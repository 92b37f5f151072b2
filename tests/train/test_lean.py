"""Gated layers that keep less: against the layer as transformers has it, and what they keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from fedfm.train.lean import gated, lean

CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)


@pytest.fixture
def layer() -> LlamaMLP:
    """A frozen layer with random weights."""
    torch.manual_seed(0)
    return LlamaMLP(CONFIG).requires_grad_(False)


def kept(run: Callable[[], torch.Tensor]) -> int:
    """Numbers kept for the backward, beside weights."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not any(isinstance(t, nn.Parameter) for t in (tensor, tensor._base)):
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


def test_the_numbers_are_those_of_the_layer_itself(layer: LlamaMLP) -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(2, 5, 8)
    usual = layer(x)
    [wanted] = torch.autograd.grad((usual * weight).sum(), x)
    with lean(gated(layer)):
        assert "forward" in vars(layer)
        leaner = layer(x)
        [got] = torch.autograd.grad((leaner * weight).sum(), x)
    torch.testing.assert_close(leaner, usual, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_two_wide_tensors_are_kept_and_not_three(layer: LlamaMLP) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    assert kept(lambda: layer(x)) == 3 * 5 * 12
    with lean(gated(layer)):
        assert kept(lambda: layer(x)) == 2 * 5 * 12


def test_no_second_derivative_in_silence(layer: LlamaMLP) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with lean(gated(layer)):
        [first] = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_layers_are_as_before_afterwards() -> None:
    model = LlamaForCausalLM(CONFIG)
    found = gated(model)
    assert len(found) == 2
    with pytest.raises(KeyError), lean(found):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_do_more_are_left_alone() -> None:
    drops, other, gelu = LlamaMLP(CONFIG), LlamaMLP(CONFIG), LlamaMLP(CONFIG)
    drops.up_proj = nn.Sequential(drops.up_proj, nn.Dropout(0.5))
    other.forward = lambda x: x
    gelu.act_fn = nn.GELU()
    assert not any(map(gated, (drops, other, gelu)))
