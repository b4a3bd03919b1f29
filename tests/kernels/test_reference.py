"""The definition itself, against numbers worked out by hand and against torch's own functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from perpo_kernels import reference
from perpo_kernels.objectives import Objective


def list_loss(scores, rewards, valid=None, beta=1.0, gamma=1.0):
    s, r = torch.tensor(scores, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    keep = None if valid is None else torch.tensor(valid)
    lists = reference.Lists(s, r, torch.tensor([0, len(scores)]), valid=keep)
    return reference.list_losses(lists, Objective(beta, gamma))[0].item()


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


def test_list_stats_by_hand():
    scores, rewards = torch.tensor([0.5, -1.0, 2.0, 9.0]), torch.tensor([4.0, 1.0, 5.0, math.nan])
    stats = reference.list_stats(reference.Lists(scores, rewards, torch.tensor([0, 4, 4])), Objective(0.1))
    torch.testing.assert_close(stats[:, 0], torch.tensor([0.2, -0.1, 1.0, 1.0]))
    assert (stats[:, 1] == 0).all()
    flipped = reference.list_stats(reference.Lists(-scores, rewards, torch.tensor([0, 4])), Objective(0.1))
    assert flipped[2].item() == 0
