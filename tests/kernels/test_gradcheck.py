"""Gradients in float64 against finite differences, and an answer to a second derivative."""

import pytest
import torch
from torch.autograd import gradcheck

import perpo_kernels as pk

from .problems import ragged_lists, random_head

LENGTHS = [[2, 1, 3], [1, 2]]


@pytest.fixture
def head(device):
    return random_head(9, 3, 5, device, torch.float64, ignored=0.1)


@pytest.fixture
def lists(device):
    lists = ragged_lists(LENGTHS, device)
    return lists._replace(rewards=lists.rewards.double(), ref_log_probs=lists.ref_log_probs.double())


def leaves(*tensors):
    return tuple(x.clone().requires_grad_() for x in tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs(device, temperature):
    logits, labels = torch.randn(3, 5, device=device).double(), torch.tensor([1, -100, 4], device=device)
    assert gradcheck(lambda x: pk.token_log_probs(x, labels, temperature=temperature, backend="eager"), leaves(logits))


MAPS = ({}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.3, "softcap": 1.5, "logit_scale": 0.8})


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("chunk", [None, 128])
def test_linear_token_log_probs(head, options, chunk):
    def fn(hidden, weight, bias):
        return pk.linear_token_log_probs(
            hidden, weight, head.labels, bias, backend="eager", max_chunk_bytes=chunk, **options
        )

    assert gradcheck(fn, leaves(head.hidden, head.weight, head.bias))
    assert gradcheck(lambda hidden: fn(hidden, head.weight, head.bias), leaves(head.hidden))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_perpo_loss(device, gamma, reduction):
    scores, rewards = torch.randn(2, 4, device=device).double(), torch.rand(2, 4, device=device).double()
    valid = torch.tensor([[True, True, False, True], [True] * 4], device=device)
    rewards[1, 1] = rewards[1, 0]

    def fn(x):
        return pk.perpo_loss(x, rewards, valid=valid, gamma=gamma, beta=0.8, reduction=reduction, backend="eager")

    assert gradcheck(fn, leaves(scores))


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("chunk", [None, 128, 6 * 64])
def test_linear_perpo_loss(head, lists, options, chunk):
    def fn(hidden, weight, bias):
        return pk.linear_perpo_loss(
            hidden, weight, head.labels, **lists._asdict(), bias=bias, beta=0.8, backend="eager", max_chunk_bytes=chunk,
            **options,
        ).loss  # fmt: skip

    assert gradcheck(fn, leaves(head.hidden, head.weight, head.bias))
    assert gradcheck(lambda hidden: fn(hidden, head.weight, head.bias), leaves(head.hidden))


def test_linear_perpo_loss_without_reduction(head, lists):
    def fn(hidden, weight):
        return pk.linear_perpo_loss(
            hidden, weight, head.labels, **lists._asdict(), reduction="none", backend="eager"
        ).loss

    assert gradcheck(fn, leaves(head.hidden, head.weight))


def test_a_second_derivative_is_refused_by_name(device, head, lists):
    """Silently wrong otherwise: what is saved for the backward pass is a constant to autograd."""
    x = torch.randn(4, 5, device=device).double().requires_grad_()
    labels = torch.tensor([0, 1, 2, 3], device=device)
    hidden, weight = leaves(head.hidden, head.weight)
    options = {"backend": "eager"}
    functions = {
        "token_log_probs": lambda: pk.token_log_probs(x, labels, **options),
        "linear_token_log_probs": lambda: pk.linear_token_log_probs(hidden, weight, head.labels, **options),
        "list_loss": lambda: pk.perpo_loss(x, x.detach(), **options),
        "linear_perpo_loss": lambda: pk.linear_perpo_loss(
            hidden, weight, head.labels, **lists._asdict(), **options
        ).loss,
    }
    for name, function in functions.items():
        leaf = x if name in ("token_log_probs", "list_loss") else hidden
        with pytest.raises(RuntimeError, match=f'{name} has first derivatives only.*backend="reference"'):
            torch.autograd.grad(function().square().sum(), leaf, create_graph=True)


def test_the_reference_backend_has_second_derivatives(device):
    x = torch.randn(2, 3, device=device).double().requires_grad_()
    rewards = torch.rand(2, 3, device=device).double()
    assert torch.autograd.gradgradcheck(lambda x: pk.perpo_loss(x, rewards, backend="reference"), (x,))
