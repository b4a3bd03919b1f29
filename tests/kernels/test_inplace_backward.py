"""inplace_backward: the gradient takes the place of the logits."""

import pytest
import torch

import perpo_kernels as pk

from .problems import random_labels
from .test_token_log_probs import VIEWS


def forward(backend, leaf, labels, inplace, view=lambda x: x):
    """The logits are not a leaf, as in a model; the gradient arrives at the leaf behind them."""
    logits = leaf * 1
    return logits, pk.token_log_probs(view(logits), labels, inplace_backward=inplace, temperature=0.8, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_gradient_is_that_of_the_ordinary_backward(backend, device, view, dtype):
    values = torch.randn(3, 4, 37, device=device).to(dtype)
    shape = view(values).shape
    labels = random_labels(shape[-1], *shape[:-1], device=device, ignored=0.2)
    gradients = []
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        forward(backend, leaf, labels, inplace, view)[1].sum().backward()
        gradients.append(leaf.grad)
    # autograd of the logits themselves, where the ordinary backward could be wrong as well
    leaf = values.clone().requires_grad_()
    pk.token_log_probs(view(leaf * 1).contiguous(), labels, temperature=0.8, backend="reference").sum().backward()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[1], leaf.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_storage_of_the_logits_is_reused(backend, device):
    leaf = torch.randn(4, 33, device=device, requires_grad=True)
    labels = random_labels(33, 4, device=device)
    logits, log_probs = forward(backend, leaf, labels, inplace=True)
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    address = logits.data_ptr()
    log_probs.sum().backward()
    assert seen == [address]
    assert torch.equal(logits, leaf.grad)


def test_the_ordinary_backward_leaves_the_logits_alone(backend, device):
    leaf = torch.randn(4, 33, device=device, requires_grad=True)
    logits, log_probs = forward(backend, leaf, random_labels(33, 4, device=device), inplace=False)
    log_probs.sum().backward()
    assert torch.equal(logits, leaf)


def test_a_second_backward_through_overwritten_logits_is_an_error(backend, device):
    leaf = torch.randn(4, 33, device=device, requires_grad=True)
    _, log_probs = forward(backend, leaf, random_labels(33, 4, device=device), inplace=True)
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_another_reader_of_overwritten_logits_is_an_error_and_not_a_wrong_number(backend, device):
    leaf = torch.randn(4, 33, device=device, requires_grad=True)
    labels = random_labels(33, 4, device=device)
    logits = leaf * 1
    other = logits.square().sum()  # saves the logits for its own backward
    log_probs = pk.token_log_probs(logits, labels, inplace_backward=True, backend=backend)
    log_probs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
