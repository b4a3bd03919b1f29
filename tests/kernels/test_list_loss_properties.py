"""What must hold of the list loss for every list: identities of the formula, found by hypothesis where they fail.

Scores are floats of moderate size and rewards come from a grid of sixteenths, so that ties are frequent and every
difference of rewards is exact.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import perpo_kernels as pk

from .accuracy import assert_equal_to_rounding

SCORE = st.floats(-8, 8, width=32)
REWARD = st.integers(-8, 16).map(lambda n: n / 16)
LIST = st.lists(st.tuples(SCORE, REWARD), min_size=0, max_size=7)
LISTS = st.lists(LIST, min_size=1, max_size=4).filter(lambda lists: any(lists))
PAIRED = st.lists(st.tuples(SCORE, REWARD), min_size=2, max_size=7)
GAMMA = st.sampled_from([0.0, 0.5, 1.0, 2.5])


@pytest.fixture(params=["eager", "reference"])
def dense_backend(request) -> str:
    return request.param


def columns(candidates, device) -> tuple[Tensor, Tensor]:
    scores, rewards = zip(*candidates, strict=True)
    return (torch.tensor(x, dtype=torch.float64, device=device) for x in (scores, rewards))


def solve(scores: Tensor, rewards: Tensor, backend: str, **options) -> tuple[Tensor, Tensor]:
    """Loss per list and its gradient, of [k] as one list or of whatever `options` says."""
    leaf = scores.detach().clone().requires_grad_()
    if leaf.dim() == 1 and "cu_lists" not in options:
        losses = pk.perpo_loss(leaf[None], rewards[None], backend=backend, reduction="none", **options)
    else:
        losses = pk.perpo_loss(leaf, rewards, backend=backend, reduction="none", **options)
    losses.sum().backward() if losses.requires_grad else None
    return losses.detach(), torch.zeros_like(scores) if leaf.grad is None else leaf.grad


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def ragged(lists, device) -> tuple[Tensor, Tensor, Tensor]:
    scores, rewards = columns([c for candidates in lists for c in candidates], device)
    return scores, rewards, pk.layout.cumulative([len(c) for c in lists], device=device)


@given(lists=LISTS, gamma=GAMMA)
def test_eager_equals_the_definition_on_any_ragged_lists(device, lists, gamma):
    scores, rewards, cu_lists = ragged(lists, device)
    options = {"cu_lists": cu_lists, "gamma": gamma, "beta": 0.7}
    for ours, exact in zip(
        solve(scores, rewards, "eager", **options), solve(scores, rewards, "reference", **options), strict=True
    ):
        close(ours, exact)


@pytest.mark.usefixtures("device")
@settings(max_examples=15)
@given(lists=LISTS, gamma=GAMMA)
def test_triton_equals_the_definition_on_any_ragged_lists(device, lists, gamma):
    pytest.importorskip("triton", reason="triton has no package for this platform")
    scores, rewards, cu_lists = ragged(lists, device)
    options = {"cu_lists": cu_lists, "gamma": gamma, "beta": 0.7}
    ours = solve(scores.float(), rewards.float(), "triton", **options)
    for got, exact in zip(ours, solve(scores, rewards, "reference", **options), strict=True):
        assert_equal_to_rounding(got, exact, scale=4)


@given(candidates=PAIRED, gamma=GAMMA, seed=st.integers(0, 99))
def test_permuting_a_list_permutes_its_gradient(device, dense_backend, candidates, gamma, seed):
    scores, rewards = columns(candidates, device)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).to(device)
    loss, gradient = solve(scores, rewards, dense_backend, gamma=gamma)
    permuted_loss, permuted_gradient = solve(scores[order], rewards[order], dense_backend, gamma=gamma)
    close(permuted_loss, loss)
    close(permuted_gradient, gradient[order])


@given(lists=LISTS, seed=st.integers(0, 99))
def test_the_order_of_lists_does_not_matter(device, dense_backend, lists, seed):
    order = torch.randperm(len(lists), generator=torch.Generator().manual_seed(seed)).tolist()
    scores, rewards, cu_lists = ragged(lists, device)
    there = solve(scores, rewards, dense_backend, cu_lists=cu_lists)[0]
    scores, rewards, cu_lists = ragged([lists[i] for i in order], device)
    close(solve(scores, rewards, dense_backend, cu_lists=cu_lists)[0], there[order])


@given(candidates=PAIRED, gamma=GAMMA, a=st.sampled_from([1e-6, 0.25, 3.0, 1e6]), b=st.sampled_from([-2.0, 0.0, 5.0]))
def test_affine_rewards_change_nothing(device, dense_backend, candidates, gamma, a, b):
    scores, rewards = columns(candidates, device)
    loss, gradient = solve(scores, rewards, dense_backend, gamma=gamma)
    for moved in (rewards * a, rewards * 4 + b):  # both keep ties exactly
        again_loss, again_gradient = solve(scores, moved, dense_backend, gamma=gamma)
        close(again_loss, loss)
        close(again_gradient, gradient)


@given(candidates=PAIRED, shift=st.floats(-100, 100, width=32))
def test_adding_a_constant_to_all_scores_changes_nothing(device, dense_backend, candidates, shift):
    scores, rewards = columns(candidates, device)
    torch.testing.assert_close(
        solve(scores + shift, rewards, dense_backend)[1], solve(scores, rewards, dense_backend)[1], rtol=1e-9, atol=1e-9
    )


@given(a=SCORE, b=SCORE, ra=REWARD, rb=REWARD, gamma=GAMMA, beta=st.sampled_from([0.01, 0.1, 1.0]))
def test_two_candidates_are_dpo_for_any_gamma(device, dense_backend, a, b, ra, rb, gamma, beta):
    scores, rewards = columns([(a, ra), (b, rb)], device)
    loss, gradient = solve(scores, rewards, dense_backend, gamma=gamma, beta=beta)
    if ra == rb:
        assert loss.item() == 0
        return
    margin = (scores[0] - scores[1]) * (1 if ra > rb else -1)
    close(loss[0], F.softplus(-beta * margin))
    close(gradient[0].abs(), beta * torch.sigmoid(-beta * margin))


@given(candidates=PAIRED)
def test_gamma_zero_is_the_plain_mean_over_preferred_pairs(device, dense_backend, candidates):
    scores, rewards = columns(candidates, device)
    pairs = [
        F.softplus(-0.1 * (scores[i] - scores[j]))
        for i in range(len(scores))
        for j in range(len(scores))
        if rewards[i] > rewards[j]
    ]
    expected = torch.stack(pairs).mean() if pairs else scores.new_zeros(())
    close(solve(scores, rewards, dense_backend, gamma=0.0)[0][0], expected)


@given(scores=st.lists(SCORE, min_size=2, max_size=7))
def test_large_gamma_is_best_against_worst(device, dense_backend, scores):
    rewards = [0.05 + 0.9 * i / len(scores) for i in range(len(scores))]
    s, r = columns(list(zip(scores, rewards, strict=True)), device)
    expected = F.softplus(-0.1 * (s[-1] - s[0]))
    torch.testing.assert_close(solve(s, r, dense_backend, gamma=4000.0)[0][0], expected, rtol=1e-9, atol=1e-9)


@given(candidates=PAIRED, gamma=GAMMA)
def test_the_gradient_of_a_list_sums_to_zero(device, dense_backend, candidates, gamma):
    gradient = solve(*columns(candidates, device), dense_backend, gamma=gamma)[1]
    assert gradient.sum().abs() <= 1e-14


@given(candidates=PAIRED, gamma=GAMMA)
def test_the_gradient_lifts_the_best_and_lowers_the_worst(device, dense_backend, candidates, gamma):
    scores, rewards = columns(candidates, device)
    gradient = solve(scores, rewards, dense_backend, gamma=gamma)[1]
    if rewards.unique().numel() > 1:
        assert (gradient[rewards == rewards.max()] < 0).all()
        assert (gradient[rewards == rewards.min()] > 0).all()


@given(candidates=PAIRED, valid=st.lists(st.booleans(), min_size=7, max_size=7))
def test_an_invalid_candidate_is_as_good_as_removed(device, dense_backend, candidates, valid):
    scores, rewards = columns(candidates, device)
    keep = torch.tensor(valid[: len(candidates)], device=device)
    loss, gradient = solve(scores, rewards, dense_backend, valid=keep[None])
    assert (gradient[~keep] == 0).all()
    if keep.any():
        rest_loss, rest_gradient = solve(scores[keep], rewards[keep], dense_backend)
        close(loss, rest_loss)
        close(gradient[keep], rest_gradient)


@given(candidates=PAIRED, where=st.integers(0, 6), junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_candidate_without_a_finite_reward_is_as_good_as_removed(device, dense_backend, candidates, where, junk):
    scores, rewards = columns(candidates, device)
    broken = torch.arange(len(scores), device=device) == where % len(scores)
    loss, gradient = solve(scores, rewards.masked_fill(broken, junk), dense_backend)
    rest_loss, rest_gradient = solve(scores[~broken], rewards[~broken], dense_backend)
    close(loss, rest_loss)
    close(gradient[~broken], rest_gradient)
    assert gradient[broken].item() == 0


@given(lists=LISTS)
def test_padded_equals_packed(device, dense_backend, lists):
    scores, rewards, cu_lists = ragged(lists, device)
    k = max(len(c) for c in lists)
    inside = torch.arange(k, device=device)[None] < cu_lists.diff()[:, None]
    padded = [torch.full(inside.shape, 0.5, dtype=torch.float64, device=device) for _ in range(2)]
    for canvas, values in zip(padded, (scores, rewards), strict=True):
        canvas[inside] = values
    packed_loss, packed_gradient = solve(scores, rewards, dense_backend, cu_lists=cu_lists)
    loss, gradient = solve(*padded, dense_backend, valid=inside)
    close(loss, packed_loss)
    close(gradient[inside], packed_gradient)
    assert (gradient[~inside] == 0).all()


@given(score=st.lists(SCORE, min_size=1, max_size=7), reward=REWARD, gamma=GAMMA)
def test_equal_rewards_cost_nothing_and_teach_nothing(device, dense_backend, score, reward, gamma):
    loss, gradient = solve(*columns([(s, reward) for s in score], device), dense_backend, gamma=gamma)
    assert loss.item() == 0
    assert (gradient == 0).all()
