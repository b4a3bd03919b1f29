"""What must hold of the objectives of the family: identities between them, and what all of them do at the edges."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perpo_kernels as pk
from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

from .family import NAMES, ZERO_SUM, Batch, OneList, batch, lambda_weights, preset
from .test_objective_family import precision

TIED = [0.9, 0.4, 0.9, 0.1, 0.4, 0.1, 0.6]


@pytest.fixture(params=["eager", "reference"])
def dense_backend(request) -> str:
    return request.param


def solve(
    objective: Objective, scores: Tensor, rewards: Tensor, backend: str = "eager", **options: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of one list [k] and its gradient."""
    leaf = scores.detach().clone().requires_grad_()
    cu_lists = torch.tensor([0, len(scores)], device=scores.device)
    if objective.length_normalized:
        options = {"lengths": torch.ones_like(scores)} | options
    loss = pk.perpo_loss(leaf, rewards, cu_lists=cu_lists, objective=objective, backend=backend, **options)
    loss.backward()
    return loss.detach(), leaf.grad


def close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def draw(device: torch.device, k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(k, device=device).double(), torch.rand(k, device=device).double()


# --------------------------------------------------------------------------------------------------------- identities


EQUAL_TO_DPO_AT_TWO = {
    "S-DPO": objectives.sdpo(0.3),
    "Plackett–Luce": objectives.plackett_luce(0.3),
    "PerPO": objectives.perpo(0.3, 2.0),
    "best against the rest": Objective(0.3, pairs="best_vs_rest"),
}


@pytest.mark.parametrize("objective", EQUAL_TO_DPO_AT_TWO.values(), ids=EQUAL_TO_DPO_AT_TWO.keys())
def test_two_candidates_are_dpo(device, dense_backend, objective):
    scores, rewards = draw(device, 2)
    close(solve(objective, scores, rewards, dense_backend), solve(objectives.dpo(0.3), scores, rewards, dense_backend))


@pytest.mark.parametrize("noisy", [objectives.cdpo, objectives.robust_dpo])
def test_labels_without_noise_are_dpo(device, dense_backend, noisy):
    scores, rewards = draw(device, 5)
    close(
        solve(noisy(0.3, epsilon=0.0), scores, rewards, dense_backend),
        solve(objectives.dpo(0.3), scores, rewards, dense_backend),
    )


def test_rpo_without_its_likelihood_term_is_dpo(device, dense_backend):
    scores, rewards = draw(device, 5)
    close(
        solve(objectives.rpo(0.3, eta=0.0), scores, rewards, dense_backend),
        solve(objectives.dpo(0.3), scores, rewards, dense_backend),
    )


def test_one_flip_probability_for_all_is_a_soft_target(device, dense_backend):
    scores, rewards = draw(device, 5)
    given = solve(objectives.rosepo(0.3), scores, rewards, dense_backend, flip_probs=torch.full_like(scores, 0.2))
    close(given, solve(Objective(0.3, weight="uniform", soft_target=0.8), scores, rewards, dense_backend))
    none = solve(objectives.rosepo(0.3), scores, rewards, dense_backend, flip_probs=torch.zeros_like(scores))
    close(none, solve(objectives.uniform_pairs(0.3), scores, rewards, dense_backend))


def test_lipo_is_given_pairs_of_lambda_weights(device, dense_backend):
    scores, rewards = draw(device, 6)
    zeros = torch.zeros_like(scores)
    weights = lambda_weights(OneList(scores, zeros, rewards, zeros, zeros, zeros))
    given = Objective(0.3, pairs="given", weight="uniform", normalize="none")
    close(
        solve(objectives.lipo(0.3), scores, rewards, dense_backend),
        solve(given, scores, rewards, dense_backend, pair_weights=weights[None]),
    )


def test_lipo_of_equal_gains_and_discounts_is_weighted_pairs(device, dense_backend):
    """Two candidates have one gain and one discount between them: LiPO is that weight times DPO."""
    scores, rewards = torch.tensor([0.3, -0.2], device=device).double(), torch.tensor([1.0, 0.0], device=device)
    weight = (2**1 - 2**0) * (1 / math.log(2) - 1 / math.log(3))
    loss, gradient = solve(objectives.dpo(0.3), scores, rewards.double(), dense_backend)
    close(solve(objectives.lipo(0.3), scores, rewards.double(), dense_backend), (weight * loss, weight * gradient))


def test_uniform_pairs_given_and_normalised_are_uniform_pairs(device, dense_backend):
    scores, rewards = draw(device, 5)
    better = (rewards[:, None] > rewards[None, :]).double()[None]
    given = Objective(0.3, pairs="given", weight="uniform")
    close(
        solve(given, scores, rewards, dense_backend, pair_weights=3 * better),
        solve(objectives.uniform_pairs(0.3), scores, rewards, dense_backend),
    )


def test_infonca_with_all_of_the_target_on_the_best_is_sdpo(device, dense_backend):
    scores, rewards = draw(device, 5)
    sharp = objectives.infonca(0.3, target_temperature=1e-4)
    close(
        solve(sharp, scores, rewards, dense_backend), solve(objectives.sdpo(0.3), scores, rewards, dense_backend), 1e-9
    )


@pytest.mark.parametrize("gamma", [0.0, 1e-13])
def test_perpo_of_vanishing_gamma_is_uniform(device, dense_backend, gamma):
    scores = torch.randn(len(TIED), device=device).double()
    rewards = torch.tensor(TIED, device=device).double()
    close(
        solve(objectives.perpo(0.3, gamma), scores, rewards, dense_backend),
        solve(objectives.uniform_pairs(0.3), scores, rewards, dense_backend),
    )


def test_tied_places_of_plackett_luce_share_one_denominator(device, dense_backend):
    a, b, c, d, e = scores = torch.randn(5, device=device).double()
    rewards = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.1], device=device).double()
    first = torch.stack([a, b, c, d, e]).logsumexp(0) - b
    second = 2 * torch.stack([a, c, d, e]).logsumexp(0) - a - c  # those tied for the last place have no term
    loss, _ = solve(objectives.plackett_luce(1.0), scores, rewards, dense_backend)
    torch.testing.assert_close(loss, first + second, rtol=1e-12, atol=1e-12)


def test_equal_scores_are_ranked_by_position(device, dense_backend):
    rewards = torch.tensor([0.2, 0.9, 0.5], device=device).double()
    zeros = torch.zeros_like(rewards)
    weights = lambda_weights(OneList(zeros, zeros, rewards, zeros, zeros, zeros))
    loss, _ = solve(objectives.lipo(0.3), zeros, rewards, dense_backend)
    torch.testing.assert_close(loss, weights.sum() * math.log(2), rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------- as TRL writes them, chosen first


def trl(loss_type: str, log_probs: Tensor, ref: Tensor, lengths: Tensor, beta: float, smoothing: float) -> Tensor:
    """`dpo_loss` of trl.DPOTrainer for one pair; with "ipo", TRL divides both log-probs by the lengths first."""
    if loss_type == "ipo":
        log_probs, ref = log_probs / lengths, ref / lengths
    if loss_type == "simpo":  # of trl.CPOTrainer, with simpo_gamma 0.5
        chosen, rejected = log_probs / lengths
        return -F.logsigmoid(beta * (chosen - rejected - 0.5 / beta))
    chosen, rejected = log_probs - ref
    logits = chosen - rejected
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
    if loss_type == "robust":
        clean, flipped = -F.logsigmoid(beta * logits), F.logsigmoid(-beta * logits)
        return (clean * (1 - smoothing) + flipped * smoothing) / (1 - 2 * smoothing)
    if loss_type == "hinge":
        return torch.relu(1 - beta * logits)
    if loss_type == "ipo":
        return (logits - 1 / (2 * beta)) ** 2
    if loss_type == "bco_pair":
        return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
    if loss_type == "sft":  # the mean over the chosen tokens of a batch, here of one pair
        return -log_probs[0] / lengths[0]
    if loss_type == "mpo":  # loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
        parts = [trl(part, log_probs, ref, lengths, beta, 0.0) for part in ("sigmoid", "bco_pair", "sft")]
        return 0.8 * parts[0] + 0.2 * parts[1] + 1.0 * parts[2]
    assert loss_type == "nca_pair"
    rewards = beta * chosen, beta * rejected
    return -F.logsigmoid(rewards[0]) - 0.5 * F.logsigmoid(-rewards[0]) - 0.5 * F.logsigmoid(-rewards[1])


OF_TRL = {
    ("sigmoid", 0.0): objectives.dpo,
    ("sigmoid", 0.1): lambda beta: objectives.cdpo(beta, 0.1),
    ("robust", 0.1): lambda beta: objectives.robust_dpo(beta, 0.1),
    ("hinge", 0.0): objectives.hinge,
    ("ipo", 0.0): objectives.ipo,
    ("nca_pair", 0.0): lambda beta: objectives.nca(beta, target_temperature=0.0),
    ("simpo", 0.0): lambda beta: objectives.simpo(beta, 0.5),
    ("bco_pair", 0.0): objectives.bco,
    ("mpo", 0.0): objectives.mpo,
}


@pytest.mark.parametrize("beta", [0.1, 0.3])  # 0.1 is TRL's default, for every one of them
@pytest.mark.parametrize(("loss_type", "smoothing"), OF_TRL, ids=str)
def test_a_pair_costs_what_it_costs_in_trl(device, dense_backend, loss_type, smoothing, beta):
    log_probs, ref = -20 * torch.rand(2, 2, device=device).double()
    lengths = torch.tensor([7.0, 4.0], device=device).double()
    rewards = torch.tensor([1.0, 0.0], device=device).double()
    leaf = log_probs.clone().requires_grad_()
    expected = trl(loss_type, leaf, ref, lengths, beta, smoothing)
    expected.backward()
    objective = OF_TRL[loss_type, smoothing](beta)
    options = {"ref_log_probs": ref} if objective.reference else {}
    got = solve(objective, log_probs, rewards, dense_backend, lengths=lengths, **options)
    close(got, (expected.detach(), leaf.grad))


# ----------------------------------------------------------------------------------------------- whatever the objective


def solve_batch(name: str, scores: Tensor, b: Batch, backend: str) -> tuple[Tensor, Tensor]:
    dtype = precision(backend)
    leaf, b = scores.detach().to(dtype).requires_grad_(), b.to(dtype)
    losses = pk.perpo_loss(
        leaf, b.rewards, **b.options(name), valid=b.valid, lengths=b.lengths, objective=preset(name),
        reduction="none", backend=backend,
    )  # fmt: skip
    losses.sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("name", ZERO_SUM)
def test_terms_of_differences_pull_with_a_sum_of_zero(device, dense_backend, name):
    b = batch(device, TIED, [0.3, 0.1])
    _, gradient = solve_batch(name, torch.randn(9, device=device).double(), b, dense_backend)
    of_scores = gradient * b.lengths if preset(name).length_normalized else gradient
    assert gradient.abs().max() > 1e-3
    assert abs(of_scores[:7].sum().item()) < 1e-12
    assert abs(of_scores[7:].sum().item()) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_candidate_is_as_good_as_removed(device, dense_backend, name):
    b = batch(device, TIED)
    scores = torch.randn(7, device=device).double()
    b.valid[1] = False
    b.rewards[3], b.rewards[6] = torch.nan, torch.inf
    b.lengths[5] = 0.0
    junk = scores.clone()
    junk[1] = torch.nan
    loss, gradient = solve_batch(name, junk, b, dense_backend)
    keep = torch.tensor([0, 2, 4], device=device)
    rest = Batch(*(x[keep] for x in b[:4]), b.given[:, keep][:, :, keep], b.valid[keep], torch.tensor([0, 3]), b.delta)
    rest = rest._replace(given=rest.given.contiguous(), cu_lists=rest.cu_lists.to(device))
    rest_loss, rest_gradient = solve_batch(name, scores[keep], rest, dense_backend)
    assert rest_loss.item() != 0
    close((loss, gradient[keep]), (rest_loss, rest_gradient))
    assert gradient.index_fill(0, keep, 0.0).tolist() == [0.0] * 7


@pytest.mark.parametrize("name", NAMES)
def test_without_a_preference_there_is_neither_loss_nor_gradient(backend, device, name):
    """A lone candidate, equal rewards, nobody left; where the pairs are given, none."""
    b = batch(device, [0.4], [0.7, 0.7, 0.7], [0.1, 0.9])
    b.valid[4:] = False
    b = b._replace(given=torch.zeros_like(b.given))
    losses, gradient = solve_batch(name, torch.randn(6, device=device).double(), b, backend)
    assert losses.tolist() == [0.0] * 3
    assert gradient.tolist() == [0.0] * 6


@pytest.mark.parametrize("name", NAMES)
def test_large_margins_stay_finite(backend, device, name):
    b = batch(device, [1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.5, 1.0, 0.0])
    scores = torch.tensor([1e5, 0.0, -1e5] * 3, device=device).double()
    losses, gradient = solve_batch(name, scores, b, backend)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert losses.abs().max() > 0


def test_weights_of_given_pairs_that_are_not_positive_are_no_pairs(backend, device):
    scores, rewards = torch.tensor([0.3, -0.2, 0.9], device=device), torch.zeros(3, device=device)
    weights = torch.tensor([[[0.0, 2.0, -1.0], [0.0, 0.0, 0.5], [torch.nan, 0.0, 0.0]]], device=device)
    clean = torch.tensor([[[0.0, 2.0, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]], device=device)
    objective = Objective(0.3, pairs="given", weight="uniform")
    close(
        solve(objective, scores, rewards, backend, pair_weights=weights),
        solve(objective, scores, rewards, backend, pair_weights=clean),
        0.0,
    )


def test_a_matrix_of_pairs_may_be_larger_than_the_lists(backend, device):
    scores, rewards = torch.tensor([0.3, -0.2], device=device), torch.zeros(2, device=device)
    wide = torch.full((1, 5, 5), 7.0, device=device)
    wide[0, :2, :2] = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    objective = Objective(0.3, pairs="given", weight="uniform")
    close(
        solve(objective, scores, rewards, backend, pair_weights=wide),
        solve(objective, scores, rewards, backend, pair_weights=wide[:, :2, :2].contiguous()),
        0.0,
    )
