"""Where the authors' formula, as they apply it, and this package differ on purpose: a case a test.

`authors_loss` takes pairs by list position, divides by the plain sum of weights and writes log(1 + exp).
"""

import math

import pytest
import torch
from torch.nn import functional as F

import perpo_kernels as pk

from .plain import authors_loss


def theirs(scores, rewards, device, beta=0.1, gamma=0.5):
    leaf = torch.tensor(scores, device=device, requires_grad=True)
    loss = authors_loss(leaf, torch.tensor(rewards, device=device), beta, gamma)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), leaf.grad


def ours(scores, rewards, device, backend, beta=0.1, gamma=0.5, **options):
    leaf = torch.tensor([scores], device=device, requires_grad=True)
    loss = pk.perpo_loss(
        leaf, torch.tensor([rewards], device=device), beta=beta, gamma=gamma, backend=backend, **options
    )
    loss.backward()
    return loss.detach(), leaf.grad[0]


def test_direction_of_a_pair_comes_from_the_rewards_and_not_from_the_position(backend, device):
    """Worst first. With γ = 1 the authors' weights stay positive (−/−), and the worst is silently preferred."""
    scores, rewards = [0.5, -0.5], [0.1, 0.9]
    assert theirs(scores, rewards, device, gamma=1.0)[1][0] < 0  # descent raises the first, which is the worst
    loss, gradient = ours(scores, rewards, device, backend, gamma=1.0)
    assert gradient[0] > 0 > gradient[1]
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(0.1)).item())


def test_equal_rewards_are_a_list_without_a_pair_and_not_nan(backend, device):
    scores, rewards = [0.5, -0.5, 0.1], [0.7, 0.7, 0.7]
    assert theirs(scores, rewards, device)[0].isnan()
    loss, gradient = ours(scores, rewards, device, backend)
    assert loss.item() == 0
    assert gradient.tolist() == [0, 0, 0]


def test_equal_rewards_do_not_spoil_the_batch(backend, device):
    scores = torch.randn(2, 2, device=device)
    rewards = torch.tensor([[0.7, 0.7], [1.0, 0.0]], device=device)
    each = [authors_loss(s, r, 0.1, 0.5) for s, r in zip(scores, rewards, strict=True)]
    assert torch.stack(each).mean().isnan()
    loss = pk.perpo_loss(scores, rewards, backend=backend)
    torch.testing.assert_close(loss, each[1] / 2)  # the inactive list counts in the mean


def test_equal_rewards_are_counted_as_inactive(backend, device):
    out = pk.linear_perpo_loss(
        torch.randn(4, 3, device=device), torch.randn(7, 3, device=device), torch.randint(7, (4,), device=device),
        torch.tensor([0.5, 0.5, 1.0, 0.0], device=device),
        cu_seqlens=torch.arange(5, dtype=torch.int32, device=device),
        cu_lists=torch.tensor([0, 2, 4], dtype=torch.int32, device=device), backend=backend,
    )  # fmt: skip
    assert out.metrics["lists/active"].item() == 0.5


def test_a_tie_weighs_nothing_at_gamma_zero(backend, device):
    """0⁰ = 1: the authors train the two equal candidates against each other, by their place in the list."""
    scores, rewards = [0.0, 0.0, -1.0], [0.5, 0.5, 0.1]
    first, second, _ = theirs(scores, rewards, device, gamma=0.0)[1].tolist()
    assert first != second
    loss, gradient = ours(scores, rewards, device, backend, gamma=0.0)
    assert gradient[0] == gradient[1]
    assert loss.item() == pytest.approx(F.softplus(torch.tensor(-0.1)).item())


@pytest.mark.parametrize("margin", [-1e3, -1e5])
def test_a_large_negative_margin_does_not_overflow(backend, device, margin):
    scores, rewards = [margin, 0.0], [1.0, 0.0]
    assert theirs(scores, rewards, device)[0].isinf()
    loss, gradient = ours(scores, rewards, device, backend)
    assert loss.item() == pytest.approx(-0.1 * margin)
    assert gradient.tolist() == pytest.approx([-0.1, 0.1])


def test_an_overflow_of_a_pair_without_weight_is_never_multiplied_by_zero(backend, device):
    """0 · inf is NaN. The tied pair has a huge margin and weight 0: it is left out by selection."""
    scores, rewards = [-1e5, 1e5, 0.0], [0.5, 0.5, 0.1]
    assert theirs(scores, rewards, device)[0].isnan()
    loss, gradient = ours(scores, rewards, device, backend)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_one_candidate_gives_a_zero_loss_that_can_be_differentiated(backend, device):
    loss, gradient = theirs([0.5], [1.0], device)
    assert loss.item() == 0 or loss.isnan()
    loss, gradient = ours([0.5], [1.0], device, backend)
    assert loss.item() == 0
    assert gradient.tolist() == [0]


def linear(backend, device, labels, rewards, cu_seqlens):
    """One list over a head in which label 0 is likely and label 1 is not."""
    hidden = torch.tensor([[1.0]] * len(labels), device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=device)
    out = pk.linear_perpo_loss(
        hidden, weight, torch.tensor(labels, device=device), torch.tensor(rewards, device=device),
        cu_seqlens=torch.tensor(cu_seqlens, device=device),
        cu_lists=torch.tensor([0, len(rewards)], device=device), backend=backend,
    )  # fmt: skip
    out.loss.backward()
    return out, hidden.grad


def test_an_empty_response_does_not_compete(backend, device):
    """Its score would be 0, above every real response: with the authors, an empty answer looks like a likely one."""
    out, _ = linear(backend, device, [1, 0], [0.0, 1.0, 0.5], [0, 0, 1, 2])
    log_likely, log_unlikely = F.log_softmax(torch.tensor([1.0, -1.0]), 0).tolist()
    among_real = F.softplus(torch.tensor(-0.1 * (log_unlikely - log_likely))).item()
    assert out.loss.item() == pytest.approx(among_real)
    with_empty = authors_loss(torch.tensor([log_unlikely, log_likely, 0.0]), torch.tensor([1.0, 0.5, 0.0]), 0.1, 0.5)
    assert out.loss.item() != pytest.approx(with_empty.item())


def test_a_fully_truncated_response_does_not_compete(backend, device):
    out, gradient = linear(backend, device, [1, 0, -100, -100], [1.0, 0.5, 0.0], [0, 1, 2, 4])
    expected, _ = linear(backend, device, [1, 0], [1.0, 0.5], [0, 1, 2])
    assert out.loss.item() == pytest.approx(expected.loss.item())
    assert (gradient[2:] == 0).all()


def test_nothing_but_truncated_responses_is_a_zero_loss_attached_to_the_graph(backend, device):
    out, gradient = linear(backend, device, [-100, -100], [1.0, 0.5], [0, 1, 2])
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert (gradient == 0).all()


def test_lists_may_be_ragged(backend, device):
    scores, rewards = torch.randn(5, device=device), torch.tensor([0.9, 0.1, 0.8, 0.5, 0.2], device=device)
    with pytest.raises(RuntimeError, match="equal size"):
        torch.stack([rewards[:2], rewards[2:]])  # how a batch of theirs is made
    losses = pk.perpo_loss(
        scores, rewards, cu_lists=torch.tensor([0, 2, 5], device=device), reduction="none", backend=backend
    )
    expected = [authors_loss(scores[a:b], rewards[a:b], 0.1, 0.5) for a, b in ((0, 2), (2, 5))]
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinite_reward_makes_the_candidate_invalid(backend, device, junk):
    scores, rewards = [0.5, 0.2, -0.5], [0.9, junk, 0.1]
    assert not theirs(scores, rewards, device)[0].isfinite()
    loss, gradient = ours(scores, rewards, device, backend)
    rest_loss, rest_gradient = ours([0.5, -0.5], [0.9, 0.1], device, backend)
    assert loss.item() == pytest.approx(rest_loss.item())
    assert gradient.tolist() == pytest.approx([rest_gradient[0].item(), 0.0, rest_gradient[1].item()])


def test_masked_positions_are_not_read(backend, device):
    """A mask of zeros times NaN is NaN; a label that says "ignore" is not looked behind."""
    logits = torch.zeros(2, 3, device=device)
    logits[1] = torch.nan
    labels, mask = torch.tensor([0, -100], device=device), torch.tensor([1.0, 0.0], device=device)
    read = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    assert (read * mask).sum().isnan()
    assert pk.token_log_probs(logits, labels, backend=backend).sum().item() == pytest.approx(math.log(1 / 3))
