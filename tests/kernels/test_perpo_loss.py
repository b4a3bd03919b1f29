"""perpo_loss: sequence log-probs and rewards to a loss, in every layout, dtype and reduction."""

import pytest
import torch

import perpo_kernels as pk

from .accuracy import DTYPES, assert_equal_to_rounding


def exact(scores, rewards, valid=None, **options):
    leaf = scores.detach().double().requires_grad_()
    losses = pk.perpo_loss(leaf, rewards.double(), valid=valid, backend="reference", reduction="none", **options)
    return leaf, losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_of_any_dtype_are_summed_in_fp32(backend, device, dtype):
    log_probs = (10 * torch.randn(3, 5, device=device)).to(dtype)
    ref, rewards = torch.randn(3, 5, device=device), torch.rand(3, 5, device=device)
    leaf = log_probs.clone().requires_grad_()
    loss = pk.perpo_loss(leaf, rewards, ref, backend=backend)
    loss.backward()
    double, losses = exact(log_probs, rewards, ref_log_probs=ref.double())
    losses.mean().backward()
    assert loss.dtype == torch.float32
    assert_equal_to_rounding(loss, losses.mean())
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_log_probs_of_one_dtype_and_reference_of_another(backend, device):
    log_probs, rewards = torch.randn(2, 4, device=device), torch.rand(2, 4, device=device)
    ref = torch.randn(2, 4, device=device).bfloat16()
    loss = pk.perpo_loss(log_probs, rewards.half(), ref, backend=backend)
    _, losses = exact(log_probs - ref.float(), rewards.half())
    assert_equal_to_rounding(loss, losses.mean())


def test_the_score_is_the_log_ratio_to_the_reference(backend, device):
    log_probs, ref, rewards = (torch.rand(2, 4, device=device) for _ in range(3))
    with_reference = pk.perpo_loss(log_probs, rewards, ref, backend=backend)
    as_difference = pk.perpo_loss(log_probs - ref, rewards, backend=backend)
    torch.testing.assert_close(with_reference, as_difference)
    assert not torch.allclose(with_reference, pk.perpo_loss(log_probs, rewards, backend=backend))


def test_reductions(backend, device):
    scores = torch.randn(3, 4, device=device)
    rewards = torch.rand(3, 4, device=device)
    rewards[1] = 0.5  # an inactive list counts in the mean
    none, total, mean = (pk.perpo_loss(scores, rewards, reduction=r, backend=backend) for r in ("none", "sum", "mean"))
    assert none.shape == (3,)
    assert none[1] == 0
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / 3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_upstream_gradient(backend, device, reduction):
    scores, rewards = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    leaf = scores.clone().requires_grad_()
    value = pk.perpo_loss(leaf, rewards, reduction=reduction, backend=backend)
    upstream = torch.randn_like(value)
    value.backward(upstream)
    double, losses = exact(scores, rewards)
    reduced = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]
    reduced.backward(upstream.double())
    assert_equal_to_rounding(leaf.grad, double.grad)


def test_upstream_gradient_of_packed_ragged_lists_goes_to_its_own_list(backend, device):
    cu_lists = torch.tensor([0, 1, 4, 4, 6], dtype=torch.int32, device=device)
    leaf = torch.randn(6, device=device, requires_grad=True)
    rewards = torch.rand(6, device=device)
    losses = pk.perpo_loss(leaf, rewards, cu_lists=cu_lists, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(
        losses, leaf, torch.tensor([5.0, 0.0, 3.0, 2.0], device=device), retain_graph=True
    )
    (unit,) = torch.autograd.grad(losses.sum(), leaf)
    expected = torch.cat([torch.zeros(4, device=device), 2 * unit[4:]])
    torch.testing.assert_close(gradient, expected)


def test_a_second_backward_gives_the_same_gradient(backend, device):
    leaf = torch.randn(2, 4, device=device, requires_grad=True)
    loss = pk.perpo_loss(leaf, torch.rand(2, 4, device=device), backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


def test_float64_on_eager_is_the_definition(device):
    scores, rewards = torch.randn(3, 6, device=device).double(), torch.rand(3, 6, device=device).double()
    valid = torch.rand(3, 6, device=device) < 0.7
    leaf = scores.clone().requires_grad_()
    losses = pk.perpo_loss(leaf, rewards, valid=valid, reduction="none", backend="eager")
    losses.sum().backward()
    double, expected = exact(scores, rewards, valid)
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(leaf.grad, double.grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_backend_reads_low_precision_as_the_others_do(device, dtype):
    """Differences of rewards and scores are taken in fp32, whichever backend takes them."""
    log_probs, rewards = 20 * torch.randn(2, 6, device=device), torch.rand(2, 6, device=device)
    options = (log_probs.to(dtype), rewards.to(dtype))
    expected = pk.perpo_loss(*(x.float() for x in options), backend="eager")
    for backend in ("eager", "reference"):
        loss = pk.perpo_loss(*options, backend=backend)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_valid_with_packed_lists(backend, device):
    cu_lists = torch.tensor([0, 3, 5], device=device)
    valid = torch.tensor([True, False, True, True, True], device=device)
    scores, rewards = torch.randn(5, device=device), torch.rand(5, device=device)
    got = pk.perpo_loss(scores, rewards, cu_lists=cu_lists, valid=valid, reduction="none", backend=backend)
    kept = pk.perpo_loss(
        scores[valid],
        rewards[valid],
        cu_lists=torch.tensor([0, 2, 4], device=device),
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(got, kept)
