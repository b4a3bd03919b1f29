"""The definition itself, against numbers worked out by hand and against torch's own functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from perpo_kernels import reference
from perpo_kernels.objectives import Objective
from perpo_kernels.problem import ListProblem


def list_loss(scores, rewards, valid=None, beta=1.0, gamma=1.0):
    s, r = torch.tensor(scores, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    keep = None if valid is None else torch.tensor(valid)
    problem = ListProblem(r, torch.tensor([0, len(scores)]), valid=keep, objective=Objective(beta, gamma))
    return reference.list_losses(s, problem)[0].item()


def softplus(x):
    return math.log1p(math.exp(x))


def test_three_candidates_by_hand():
    """Margins 1, 3 and 4 of rewards 5 > 4 > 1 weigh 1/8, 4/8 and 3/8 at γ = 1."""
    got = list_loss([0.5, -1.0, 2.0], [4.0, 1.0, 5.0])
    expected = (3 * softplus(-1.5) + 1 * softplus(-1.5) + 4 * softplus(-3.0)) / 8
    assert got == pytest.approx(expected, rel=1e-12)


def test_gamma_is_the_power_of_the_margin_and_beta_the_scale_of_the_score():
    weights = [3**0.5, 1.0, 4**0.5]
    losses = [softplus(-0.1 * 1.5), softplus(-0.1 * 1.5), softplus(-0.1 * 3.0)]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert list_loss([0.5, -1.0, 2.0], [4.0, 1.0, 5.0], beta=0.1, gamma=0.5) == pytest.approx(expected, rel=1e-12)


def test_token_log_probs_is_the_negative_cross_entropy():
    logits, labels = torch.randn(2, 5, 11).double(), torch.randint(11, (2, 5))
    labels[0, 2] = -100
    got = reference.token_log_probs(logits, labels, temperature=0.7)
    expected = -F.cross_entropy((logits / 0.7).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(got.flatten(), expected)
    assert got[0, 2] == 0


def test_head_logits_scale_before_the_softcap():
    hidden, weight, bias = (torch.randn(s).double() for s in ((3, 4), (6, 4), (6,)))
    raw = 1.5 * (hidden @ weight.t() + bias)
    torch.testing.assert_close(reference.head_logits(hidden, weight, bias, None, 1.5), raw)
    torch.testing.assert_close(reference.head_logits(hidden, weight, bias, 2.0, 1.5), 2 * torch.tanh(raw / 2))


def test_sequence_log_probs_sum_a_candidate_and_count_its_tokens():
    labels, cu_seqlens = torch.tensor([1, -100, 2, 3, -100]), torch.tensor([0, 2, 2, 4, 5])
    log_probs = torch.tensor([-1.0, 0.0, -2.0, -4.0, 0.0])
    sums, counts = reference.sequence_log_probs(log_probs, labels, cu_seqlens)
    assert sums.tolist() == [-1.0, 0.0, -6.0, 0.0]
    assert counts.tolist() == [1, 0, 2, 0]
    weights = torch.tensor([3.0, torch.nan, 0.5, 2.0, torch.nan])
    sums, counts = reference.sequence_log_probs(log_probs, labels, cu_seqlens, token_weights=weights)
    assert sums.tolist() == [-3.0, 0.0, -9.0, 0.0]
    assert counts.tolist() == [1, 0, 2, 0]


def test_what_candidates_are_ranked_by():
    log_probs, rewards = torch.tensor([0.5, -1.0, 2.0, 9.0]), torch.tensor([4.0, 1.0, 5.0, math.nan])
    problem = ListProblem(rewards, torch.tensor([0, 4, 4]), ref_log_probs=torch.tensor([0.5, 1.0, 1.0, 1.0]))
    candidates, active = reference.ranked_by(log_probs, problem._replace(valid=torch.tensor([True, False, True, True])))
    expected = [[0.5, -1.0, 2.0, 9.0], [0.0, -2.0, 1.0, 8.0], [4.0, math.nan, 5.0, math.nan]]
    torch.testing.assert_close(candidates, torch.tensor(expected), equal_nan=True)
    assert active.tolist() == [1.0, 0.0]
