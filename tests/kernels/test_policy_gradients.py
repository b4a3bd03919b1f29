"""PerPO and policy gradients are one family, and the terms of an objective add up by their weights."""

import math

import pytest
import torch
from torch import Tensor

from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

from .test_objective_family import precision
from .test_objective_identities import TIED, close, dense_backend, draw, solve

__all__ = ["dense_backend"]  # a fixture

LISTS_OF_REWARDS = {"distinct": [0.31, 0.9, 0.12, 0.77, 0.5], "tied": TIED, "two": [0.2, 0.9]}


@pytest.fixture(params=LISTS_OF_REWARDS.values(), ids=LISTS_OF_REWARDS.keys())
def rewards(request, device) -> Tensor:
    return torch.tensor(request.param, device=device).double()


def test_perpo_at_the_reference_is_grpo_with_the_gini_mean_difference_for_the_deviation(dense_backend, rewards):
    k, zeros = len(rewards), torch.zeros_like(rewards)
    gini = (rewards[:, None] - rewards[None, :]).abs().sum() / k**2
    _, gradient = solve(objectives.perpo(0.3, gamma=1.0), zeros, rewards, dense_backend)
    torch.testing.assert_close(gradient, -0.3 / k * (rewards - rewards.mean()) / gini, rtol=1e-10, atol=1e-10)
    _, of_grpo = solve(objectives.grpo(0.3), zeros, rewards, dense_backend)
    torch.testing.assert_close(gradient, of_grpo * rewards.std() / gini, rtol=1e-10, atol=1e-10)


def test_published_gammas_pull_almost_as_grpo_does(device, dense_backend):
    """At the reference, over lists of 20 rewards in [0, 1]: the pull of γ = 0.5 correlates with GRPO's advantages."""
    found = []
    for _ in range(25):
        rewards = torch.rand(20, device=device).double()
        zeros = torch.zeros_like(rewards)
        both = [
            solve(one, zeros, rewards, dense_backend)[1] for one in (objectives.perpo(gamma=0.5), objectives.grpo())
        ]
        found.append(torch.corrcoef(torch.stack(both))[0, 1])
    assert torch.stack(found).median() > 0.996
    assert torch.stack(found).min() > 0.97


def leave_one_out(rewards: Tensor, scores: Tensor) -> Tensor:
    """RLOO: each answer against the mean of the others."""
    k = len(rewards)
    return -((rewards - (rewards.sum() - rewards) / (k - 1)) * scores).mean()


@pytest.mark.parametrize("at_reference", [True, False])
def test_p3o_is_rloo_and_dr_grpo_over_lists_without_ties(device, dense_backend, at_reference):
    """Linear in the scores: the gradient is the same wherever the policy is."""
    scores, rewards = draw(device, 6)
    scores = torch.zeros_like(scores) if at_reference else scores
    leaf = scores.clone().requires_grad_()
    loss = leave_one_out(rewards, leaf)
    loss.backward()
    p3o = solve(objectives.p3o(0.5), scores, rewards, dense_backend)
    close(p3o, (loss.detach(), leaf.grad))
    close(p3o, solve(objectives.dr_grpo(6 / 5), scores, rewards, dense_backend))


def test_grpo_is_dr_grpo_over_the_deviation(dense_backend, rewards):
    scores = torch.linspace(-1, 1, len(rewards), dtype=torch.float64, device=rewards.device)
    loss, gradient = solve(objectives.dr_grpo(), scores, rewards, dense_backend)
    deviation = rewards.std()
    close(solve(objectives.grpo(), scores, rewards, dense_backend), (loss / deviation, gradient / deviation))


def test_gspo_right_after_sampling_is_grpo_over_the_lengths(device, dense_backend, rewards):
    log_probs = -5 * torch.rand(len(rewards), device=device).double()
    lengths = torch.arange(1.0, len(rewards) + 1, device=device).double()
    loss, gradient = solve(
        objectives.gspo(), log_probs, rewards, dense_backend, ref_log_probs=log_probs, lengths=lengths
    )
    _, of_grpo = solve(objectives.grpo(), log_probs, rewards, dense_backend)
    torch.testing.assert_close(gradient, of_grpo / lengths, rtol=1e-10, atol=1e-12)
    assert abs(loss.item()) < 1e-12  # the mean advantage


@pytest.mark.parametrize(
    ("log_ratio", "follows_best", "follows_worst"), [(0.1, True, True), (1.0, False, True), (-1.0, True, False)]
)
def test_gspo_stops_where_the_ratio_has_gone_far_enough(backend, device, log_ratio, follows_best, follows_worst):
    """A good answer is raised up to 1 + clip_high, a bad one lowered down to 1 − clip_low, and either is drawn back."""
    ref = torch.zeros(2, device=device)
    gspo = objectives.gspo(clip_low=0.3, clip_high=0.3)
    rewards = torch.tensor([1.0, 0.0], device=device)
    options = {"ref_log_probs": ref, "lengths": torch.full((2,), 2.0, device=device)}
    _, gradient = solve(gspo, ref + 2 * log_ratio, rewards, backend, **options)
    assert (gradient != 0).tolist() == [follows_best, follows_worst]


def test_a_ratio_is_held_where_fp32_ends(backend, device):
    """The worse answer has become e¹⁰⁰ times as likely: its ratio counts as e⁸⁰, and nothing pulls at what is held."""
    rewards, scores = torch.tensor([1.0, 0.0], device=device), torch.tensor([0.0, 100.0], device=device)
    options = {"ref_log_probs": torch.zeros(2, device=device), "lengths": torch.ones(2, device=device)}
    loss, gradient = solve(objectives.gspo(), scores, rewards, backend, **options)
    torch.testing.assert_close(
        loss.double(), torch.tensor(math.sqrt(0.5) / 2 * math.exp(80)).double(), rtol=1e-4, atol=0
    )
    assert gradient[1] == 0
    assert gradient[0] != 0


def test_bco_of_another_shift_is_that_of_shifted_scores(device, dense_backend):
    scores, rewards = draw(device, 5)
    shifted = solve(
        objectives.bco(0.3), scores, rewards, dense_backend, delta=torch.tensor(0.6, dtype=torch.float64, device=device)
    )
    close(shifted, solve(objectives.bco(0.3), scores - 0.6 / 0.3, rewards, dense_backend))


def test_terms_add_up_by_their_weights(backend, device):
    """A term of each kind, of which `mpo` is one mix, and its parts alone."""
    scores, rewards = (x.to(precision(backend)) for x in draw(device, 7))
    lengths = torch.arange(1.0, 8.0, device=device, dtype=scores.dtype)
    mix = Objective(
        0.3, 1.5, normalize="none", pair_scale=0.7, list_term="plackett_luce", list_scale=0.2, pointwise="bco",
        pointwise_scale=3.0, nll=0.25, nll_per_token=True,
    )  # fmt: skip
    loss, gradient = solve(mix, scores, rewards, backend, lengths=lengths)
    parts = {
        0.7: Objective(0.3, 1.5, normalize="none"),
        0.2: objectives.plackett_luce(0.3),
        3.0: objectives.bco(0.3),
    }
    best = int(rewards.argmax())
    expected_loss = -0.25 * scores[best] / lengths[best]
    expected = torch.zeros_like(scores)
    expected[best] = -0.25 / lengths[best]
    for weight, part in parts.items():
        part_loss, part_gradient = solve(part, scores, rewards, backend)
        expected_loss, expected = expected_loss + weight * part_loss, expected + weight * part_gradient
    tolerance = 1e-6 if backend == "triton" else 1e-12
    torch.testing.assert_close(loss, expected_loss, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=10 * tolerance, atol=tolerance)
