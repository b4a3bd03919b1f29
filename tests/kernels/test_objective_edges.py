"""What real data holds and formulas do not mention: weights of nothing, pairs both ways, impossible answers."""

from dataclasses import replace

import pytest
import torch

import perpo_kernels as pk
from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

from .problems import IGNORED


def of_tokens(backend, token_weights, trainable=False, labels=(1, 2, 3, IGNORED, 0, 2, 1, 1), **options):
    """A list of four candidates of two tokens each: the output and the gradient of the hidden states."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if backend == "triton" else torch.float64
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (8, 5))
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    out = pk.linear_perpo_loss(
        hidden, weight, torch.tensor(labels), torch.tensor([0.9, 0.1, 0.5, 0.3]),
        cu_seqlens=torch.arange(0, 9, 2, dtype=torch.int32), cu_lists=torch.tensor([0, 4], dtype=torch.int32),
        token_weights=None if token_weights is None else torch.tensor(token_weights, dtype=dtype),
        backend=backend, **options,
    )  # fmt: skip
    out.loss.backward()
    return out, hidden.grad


@pytest.mark.parametrize("trainable", [False, True])
def test_a_weight_of_an_ignored_token_may_be_anything(backend, trainable):
    with_nan = of_tokens(backend, [1.0, 0.5, 2.0, float("nan"), 1.0, 1.0, 0.7, 1.0], trainable)
    plain = of_tokens(backend, [1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 0.7, 1.0], trainable)
    assert torch.equal(with_nan[0].loss, plain[0].loss)
    assert torch.equal(with_nan[1], plain[1])


def test_a_token_of_weight_zero_is_as_absent_as_an_ignored_one(backend):
    labels = (1, 2, 3, 4, 0, 2, 1, 1)
    masked = of_tokens(backend, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], labels=labels, objective=objectives.ipo())
    ignored = of_tokens(backend, None, labels=(1, 2, IGNORED, IGNORED, 0, IGNORED, 1, 1), objective=objectives.ipo())
    assert torch.allclose(masked[0].loss, ignored[0].loss, rtol=1e-6)
    assert torch.allclose(masked[1], ignored[1], rtol=1e-5, atol=1e-7)
    assert masked[1][2:4].eq(0).all()  # the candidate has no other tokens: it takes part in no pair


def of_scores(backend, objective, scores, rewards, **options):
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaf = torch.tensor([scores], dtype=dtype, requires_grad=True)
    options = {name: torch.tensor(value, dtype=dtype) for name, value in options.items()}
    loss = pk.perpo_loss(leaf, torch.tensor([rewards], dtype=dtype), objective=objective, backend=backend, **options)
    loss.backward()
    return loss.item(), leaf.grad[0]


@pytest.mark.parametrize("name", ["dpo", "perpo", "uniform_pairs", "rpo"])
def test_an_impossible_answer_that_is_rejected_costs_nothing(backend, name):
    loss, gradient = of_scores(backend, objectives.PRESETS[name](), [-0.1, -torch.inf], [1.0, 0.0])
    assert loss == pytest.approx(0.0, abs=1e-4)  # rpo: β · η times its log-prob
    assert gradient.isfinite().all()


def test_pairs_may_go_both_ways_and_to_themselves(backend):
    scores, weights = [0.3, -0.4, 0.9], [[[0.5, 1.0, 0.0], [2.0, 0.0, 0.7], [0.0, 0.0, 0.0]]]
    objective = Objective(0.6, pairs="given", weight="uniform", normalize="none")
    loss, gradient = of_scores(backend, objective, scores, [0.2, 0.2, 0.8], pair_weights=weights)
    leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    ahead = 0.6 * (leaf[:, None] - leaf[None, :])
    expected = (torch.tensor(weights[0], dtype=torch.float64) * torch.nn.functional.softplus(-ahead)).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient.double(), leaf.grad, atol=1e-6)


def test_a_score_without_pairs_spoils_no_other(backend):
    objective = Objective(0.6, pairs="given", weight="uniform", normalize="none")
    weights = [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    loss, gradient = of_scores(backend, objective, [0.3, -0.4, torch.nan], [0.9, 0.2, 0.8], pair_weights=weights)
    assert loss == pytest.approx(torch.nn.functional.softplus(torch.tensor(-0.42)).item(), rel=1e-5)
    assert gradient[:2].isfinite().all()
    assert gradient[2] == 0


def test_ranks_and_a_plackett_luce_term_together(backend):
    objective = Objective(0.7, weight="lambda", normalize="none", list_term="plackett_luce")
    scores, rewards = [0.3, -1.2, 0.7, 0.1], [0.1, 0.9, 0.5, 0.3]
    got = of_scores(backend, objective, scores, rewards)
    parts = [
        of_scores(backend, one, scores, rewards)
        for one in (Objective(0.7, weight="lambda", normalize="none"), objectives.plackett_luce(0.7))
    ]
    assert got[0] == pytest.approx(parts[0][0] + parts[1][0], rel=1e-6)
    assert torch.allclose(got[1], parts[0][1] + parts[1][1], rtol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_flip_probability_is_a_probability(backend, value):
    with pytest.raises(ValueError, match=r"flip_probs must be probabilities in \[0, 1\]"):
        of_scores(backend, objectives.rosepo(), [0.3, 0.1], [1.0, 0.0], flip_probs=[[0.1, value]])


def test_rosepo_is_not_trained_without_its_probabilities():
    with pytest.raises(ValueError, match="flip_probs must be given"):
        pk.perpo_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), objective=objectives.rosepo())


@pytest.mark.parametrize("call", [pk.PerPOLoss, pk.LinearPerPOLoss])
def test_beta_is_said_once(call):
    with pytest.raises(ValueError, match="beta and objective are both given"):
        call(beta=0.2, objective=objectives.dpo())
    with pytest.raises(TypeError, match=r"call the preset: objectives.dpo\(\)"):
        call(objective=objectives.dpo)


@pytest.mark.parametrize("name", ["plackett_luce", "perpo"])
def test_a_list_of_1024(backend, name):
    """More than a tile in either direction, on every backend; LiPO's ranks of as many are in tests/gpu."""
    generator = torch.Generator().manual_seed(1)
    scores, rewards = (torch.randn(1024, generator=generator).tolist() for _ in range(2))
    rewards = [round(r, 1) for r in rewards]  # with ties
    objective = objectives.PRESETS[name]()
    if backend == "reference":
        pytest.skip("a million pairs in a Python loop")
    got, expected = (of_scores(one, objective, scores, rewards) for one in (backend, "eager"))
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert torch.allclose(got[1].double(), expected[1].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", [objectives.infonca, objectives.nca])
def test_the_smallest_temperature_is_the_best_alone(backend, device, preset):
    def solve(temperature):
        scores = torch.tensor([[0.3, -0.2, 0.9]], device=device, requires_grad=True)
        objective = replace(preset(), target_temperature=temperature)
        rewards = torch.tensor([[0.1, 0.8, 0.5]], device=device)
        loss = pk.perpo_loss(scores, rewards, objective=objective, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, scores)

    torch.testing.assert_close(solve(1e-30), solve(0.0))
