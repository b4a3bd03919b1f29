"""The list loss at the edge of the number range and of the shapes, on every backend."""

import math

import pytest
import torch
from torch.nn import functional as F

import perpo_kernels as pk

BACKENDS = ("eager", "triton", "reference")


@pytest.fixture(params=BACKENDS)
def any_backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton has no package for this platform")
    return request.param


def solve(scores, rewards, backend, device, **options):
    leaf = torch.tensor(scores, device=device, requires_grad=True)
    loss = pk.perpo_loss(leaf, torch.tensor(rewards, device=device), backend=backend, **options)
    if loss.requires_grad:
        loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_margins_of_ten_thousand_over_beta_stay_finite(any_backend, device, beta, sign):
    margin = sign * 1e4 / beta
    loss, gradient = solve([[margin, 0.0]], [[1.0, 0.0]], any_backend, device, beta=beta)
    assert loss.item() == pytest.approx(max(0.0, -sign * 1e4), rel=1e-6)
    expected = 0.0 if sign > 0 else beta
    assert gradient.tolist() == [[pytest.approx(-expected), pytest.approx(expected)]]


def test_a_small_positive_loss_is_not_rounded_to_zero(any_backend, device):
    """softplus(−30) is 9.4e-14: log(1 + e) in fp32 would be 0."""
    loss, _ = solve([[30.0, 0.0]], [[1.0, 0.0]], any_backend, device, beta=1.0)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1.5e38])
def test_rewards_of_any_normal_size(any_backend, device, size):
    loss, gradient = solve([[-1.0, -2.0]], [[size, 0.0]], any_backend, device)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-0.1)).item(), rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("high", "low"), [(3e38, -3e38), (1e-40, 0.0), (1e-45, 0.0)])
def test_rewards_whose_range_leaves_fp32(any_backend, device, high, low):
    """The range overflows, or its reciprocal does. Two distinct finite rewards are still DPO."""
    loss, gradient = solve([[-1.0, -2.0]], [[high, low]], any_backend, device)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-0.1)).item(), rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("top", [4.2e-45, 7e-42, 1.5e-38, 3e38])
def test_weights_are_shares_of_the_range_at_any_size_of_rewards(any_backend, device, top):
    """Also where rewards are subnormal numbers: 4.2e-45 is three of the smallest."""
    scores, rewards = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[top, 0.0, top / 3]])
    loss, gradient = solve(scores.tolist(), rewards.tolist(), any_backend, device)
    like, gradient_like = solve(scores.tolist(), (rewards.double() / rewards.double().max()).tolist(), "eager", device)
    assert loss.item() == pytest.approx(like.item(), rel=1e-6)
    torch.testing.assert_close(gradient, gradient_like, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("gamma", [60.0, 1e4, 1e9, 1e12, 1e38])
def test_any_finite_gamma_is_best_against_worst_in_the_limit(any_backend, device, gamma):
    """1.089 · fl(1 / 1.089) < 1 in fp32: a range that is not exactly one must not vanish under a large power."""
    loss, _ = solve([[-1.0, -2.0, -4.0]], [[0.0, 1.089, 0.3]], any_backend, device, gamma=gamma)
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(0.1)).item(), rel=1e-5)


def test_one_candidate_is_zero_and_attached_to_the_graph(any_backend, device):
    for shape in ((1, 1), (3, 1)):
        leaf = torch.zeros(shape, device=device, requires_grad=True)
        loss = pk.perpo_loss(leaf * 2, torch.ones(shape, device=device), backend=any_backend)
        assert loss.item() == 0
        assert loss.requires_grad
        loss.backward()
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_candidates_at_all(any_backend, device, shape):
    leaf = torch.zeros(shape, device=device, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = pk.perpo_loss(leaf, torch.zeros(shape, device=device), backend=any_backend, reduction=reduction)
        assert loss.item() == 0
    losses = pk.perpo_loss(leaf, torch.zeros(shape, device=device), backend=any_backend, reduction="none")
    assert losses.tolist() == [0.0] * shape[0]


def test_packed_lists_that_are_all_empty(any_backend, device):
    empty = torch.zeros(0, device=device)
    cu_lists = torch.zeros(4, dtype=torch.int32, device=device)
    losses = pk.perpo_loss(empty, empty, cu_lists=cu_lists, backend=any_backend, reduction="none")
    assert losses.tolist() == [0.0] * 3


def test_an_empty_list_between_full_ones(any_backend, device):
    s, r = torch.tensor([0.0, 1.0, 2.0, 0.0], device=device), torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    cu_lists = torch.tensor([0, 0, 2, 2, 4, 4], device=device)
    losses = pk.perpo_loss(s, r, cu_lists=cu_lists, backend=any_backend, reduction="none")
    assert [x > 0 for x in losses.tolist()] == [False, True, False, True, False]


def test_nan_in_one_list_stays_in_that_list(any_backend, device):
    """A diverged candidate must not poison its neighbours, whether lists are padded to one another or not."""
    scores = [[math.nan, 0.0, 1.0], [0.5, 0.2, -1.0]]
    rewards = [[1.0, 0.5, 0.0], [0.1, 0.6, 0.4]]
    losses, gradient = solve(scores, rewards, any_backend, device, reduction="none")
    assert losses.isnan().tolist() == [True, False]
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 5.0])
def test_what_stands_at_an_invalid_candidate_is_never_read(any_backend, device, junk):
    valid = torch.tensor([[True, False, True]], device=device)
    clean = solve([[0.5, 0.0, 1.0]], [[1.0, 0.5, 0.0]], any_backend, device, valid=valid)
    dirty = solve([[0.5, junk, 1.0]], [[1.0, junk, 0.0]], any_backend, device, valid=valid)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_a_candidate_without_a_reward_may_hold_anything(any_backend, device):
    clean = solve([[0.5, 0.0, 1.0]], [[1.0, math.nan, 0.0]], any_backend, device)
    dirty = solve([[0.5, math.nan, 1.0]], [[1.0, math.nan, 0.0]], any_backend, device)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_strided_inputs_are_read_where_they_are(any_backend, device):
    s = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device)
    r = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    ref = torch.tensor([0.3, 0.1, 0.2, 0.9], device=device)
    cu_lists = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    valid = torch.tensor([True, True, True, True], device=device)
    expected = pk.perpo_loss(s, r, ref, cu_lists=cu_lists, valid=valid, backend=any_backend, reduction="none")

    def strided(x):
        wide = torch.stack([x, torch.ones_like(x)], -1)  # ones in between: a wrong read stays in bounds
        return wide[..., 0]

    got = pk.perpo_loss(
        strided(s), strided(r), strided(ref), cu_lists=strided(cu_lists), valid=strided(valid),
        backend=any_backend, reduction="none",
    )  # fmt: skip
    assert torch.equal(got, expected)
