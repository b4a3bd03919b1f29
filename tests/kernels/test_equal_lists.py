"""Equally long lists of scores and rewards on the CPU go past the operator: when they do, and that nobody can tell."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perpo_kernels as pk
from perpo_kernels import functional, objectives
from perpo_kernels.objectives import Objective

from .test_host_work import events

OF_SCORES = {
    name: preset()
    for name, preset in objectives.PRESETS.items()
    if not (preset().length_normalized or preset().nll_per_token or preset().flips or preset().pairs == "given")
}
MORE = {
    "offset": Objective(offset=0.3),
    "hinge": Objective(link="hinge"),
    "squared": Objective(link="squared"),
    "smoothed": Objective(soft_target=0.8),
    "gamma 0.1": Objective(gamma=0.1),
    "two terms": Objective(list_term="softmax", nll=0.5),
}


class Looking(TorchDispatchMode):
    """Where a mode looks on, everything goes by the operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operator_calls(monkeypatch):
    calls = []
    by_operator = functional._list_loss
    monkeypatch.setattr(functional, "_list_loss", lambda *args: calls.append(1) or by_operator(*args))
    return calls


def lists(dtype=torch.float32, n=3, k=5, reference=True):
    rewards = torch.rand(n, k).mul(4).round().div(4)  # with ties
    rewards[0] = 0.5  # a list without a pair
    ref = (3 * torch.randn(n, k)).to(dtype) if reference else None
    return (3 * torch.randn(n, k)).to(dtype).requires_grad_(), rewards, ref


def solve(log_probs, rewards, ref, around=nullcontext, **options):
    with around():
        loss = pk.perpo_loss(log_probs, rewards, ref, **options)
        (gradient,) = torch.autograd.grad(loss, log_probs, torch.full_like(loss, 1.5))
    return loss.detach(), gradient


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [*OF_SCORES.values(), *MORE.values()], ids=[*OF_SCORES, *MORE])
def test_loss_and_gradient_are_those_of_the_operator(operator_calls, objective, dtype, reduction):
    arguments = lists(dtype, reference=objective.reference)
    options = {"objective": objective, "reduction": reduction}
    loss, gradient = solve(*arguments, **options)
    assert not operator_calls
    expected, expected_gradient = solve(*arguments, around=Looking, **options)
    assert len(operator_calls) == 1
    assert (loss.dtype, gradient.dtype) == (expected.dtype, dtype)
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss, expected, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(gradient, expected_gradient, rtol=max(8 * eps, torch.finfo(dtype).eps), atol=8 * eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.parametrize("place", ["log_probs", "ref_log_probs", "rewards", "two rewards"])
@pytest.mark.parametrize("objective", [Objective(), objectives.dpo(), objectives.grpo(), MORE["squared"]], ids=str)
def test_wild_numbers_give_what_the_operator_gives(place, value, objective):
    log_probs, rewards, ref = lists()
    log_probs = log_probs.detach()
    {"log_probs": log_probs, "ref_log_probs": ref}.get(place, rewards)[1, 2] = value
    if place == "two rewards":
        rewards[1, 3] = -value
    arguments = log_probs.requires_grad_(), rewards, ref
    loss, gradient = solve(*arguments, objective=objective)
    expected, expected_gradient = solve(*arguments, around=Looking, objective=objective)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


def test_what_does_not_fit_goes_by_the_operator(operator_calls):
    log_probs, rewards, ref = lists()
    everyone = torch.ones_like(rewards, dtype=torch.bool)
    for options in ({"valid": everyone}, {"list_weights": torch.ones(3)}, {"backend": "triton"}):
        if options.get("backend") != "triton" or pk.backends.triton_problem("cpu", torch.float32) is None:
            pk.perpo_loss(log_probs, rewards, ref, **options)
            assert operator_calls.pop()
    absent = rewards.masked_fill(~everyone.triu(), torch.nan)
    pk.perpo_loss(log_probs, absent, ref)
    assert operator_calls.pop()
    with torch.autocast("cpu", torch.bfloat16):
        pk.perpo_loss(log_probs, rewards, ref)
    assert operator_calls.pop()
    pk.perpo_loss(log_probs.flatten(), rewards.flatten(), cu_lists=torch.tensor([0, 5, 10, 15], dtype=torch.int32))
    assert operator_calls.pop()
    pk.perpo_loss(log_probs[:, :0], rewards[:, :0])
    assert operator_calls.pop()


def test_a_second_derivative_is_refused():
    log_probs, rewards, ref = lists()
    loss = pk.perpo_loss(log_probs, rewards, ref)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, log_probs, create_graph=True)


def test_a_graph_that_is_kept_gives_the_same_twice():
    log_probs, rewards, ref = lists()
    loss = pk.perpo_loss(log_probs, rewards, ref)
    first, second = (torch.autograd.grad(loss, log_probs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_gradient_is_promised_where_none_is_asked_for():
    log_probs, rewards, ref = lists()
    with torch.no_grad():
        assert not pk.perpo_loss(log_probs, rewards, ref).requires_grad
    assert not pk.perpo_loss(log_probs.detach(), rewards, ref).requires_grad


def test_operations_of_a_step():
    """As many as plain PyTorch needs for its forward pass and derivative, or fewer: for a few lists, the time is theirs
    (`benchmarks/test_list_loss.py`)."""
    from benchmarks.peers import plain_list_loss

    log_probs, rewards, ref = lists(n=2, k=20)
    ours = events(lambda: solve(log_probs, rewards, ref))
    plain = events(lambda: torch.autograd.grad(plain_list_loss(log_probs, rewards, ref), log_probs))
    assert len(ours) <= len(plain)
