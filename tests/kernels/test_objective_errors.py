"""Objectives that mean nothing, and tensors that do not go with an objective: each with its sentence."""

import pytest
import torch

import perpo_kernels as pk
from perpo_kernels import objectives
from perpo_kernels.objectives import CHOICES, Objective

from .test_errors import T, inputs, linear_loss, loss

MEANINGLESS = {
    "pairs='none' needs a list_term or a pointwise term: with nothing that compares candidates": {"pairs": "none"},
    "soft_target and flips are probabilities of the logistic link of pairs, but link is 'hinge'": {
        "link": "hinge",
        "soft_target": 0.9,
    },
    "pair_scale must be left at 1.0, got 2.0: it shapes the pair term, and pairs is 'none'": {
        "pairs": "none",
        "list_term": "softmax",
        "pair_scale": 2.0,
    },
    "list_scale must be left at 1.0, got 2.0: it weighs the list term, and list_term is 'none'": {"list_scale": 2.0},
    "pointwise_scale must be left at 1.0, got 2.0: it weighs the pointwise term": {"pointwise_scale": 2.0},
    "nll_per_token must be left at False, got True: it shapes the nll term, and nll is 0": {"nll_per_token": True},
    "advantage must be left at 'centered', got 'standardized': it is of pointwise='policy_gradient' and 'clipped'": {
        "pointwise": "bco",
        "advantage": "standardized",
    },
    "clip_high must be left at 0.2, got 0.5: it is of pointwise='clipped'": {
        "pointwise": "policy_gradient",
        "clip_high": 0.5,
    },
    "pointwise='clipped' takes the ratio to the policy that sampled, so reference must be True": {
        "pointwise": "clipped",
        "reference": False,
    },
    "pairs='given' brings its own weights, which weight='lambda' would replace": {"pairs": "given", "weight": "lambda"},
    "log_margin takes the logarithm of r_i − r_j, which given pairs need not": {"pairs": "given", "log_margin": 1.0},
    "target_temperature shapes the target of list_term='softmax' and pointwise='nca' only": {"target_temperature": 1.0},
}


@pytest.mark.parametrize(("sentence", "fields"), MEANINGLESS.items(), ids=str)
def test_a_combination_without_meaning_is_refused_with_the_reason(sentence, fields):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        Objective(**fields)


def test_a_likelihood_alone_is_no_preference():
    with pytest.raises(ValueError, match="nothing that compares candidates"):
        Objective(pairs="none", nll=1.0)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_told_the_known_ones(name):
    with pytest.raises(ValueError, match=f"{name} must be one of {', '.join(CHOICES[name])}, got 'magic'"):
        Objective(**{name: "magic"})


@pytest.mark.parametrize("noisy", [objectives.cdpo, objectives.robust_dpo])
@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 1.0, float("nan")])
def test_epsilon_is_a_probability_below_one_half(noisy, epsilon):
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 0.5\), got"):
        noisy(epsilon=epsilon)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 9e-31])
def test_a_temperature_whose_inverse_is_no_number_of_fp32_is_refused(temperature):
    sentence = r"target_temperature must be 0 \(the best alone\) or at least 1e-30, got"
    with pytest.raises(ValueError, match=sentence):
        Objective(pairs="none", list_term="softmax", target_temperature=temperature)


def pair(**changes):
    """perpo_loss of two lists of three."""
    return lambda: loss(torch.zeros(2, 3), torch.rand(2, 3), **changes)


def linear(**changes):
    return lambda: linear_loss(**changes)


SQUARE, GIVEN = torch.ones(2, 3, 3), objectives.mdpo()
CASES = {
    "objective must be a perpo_kernels.objectives.Objective, got str": pair(objective="dpo"),
    "ref_log_probs must be None: this objective is defined without a reference model": pair(
        objective=objectives.simpo(), lengths=torch.ones(2, 3), ref_log_probs=torch.zeros(2, 3)
    ),
    "ref_log_probs must be None: this objective": linear(objective=objectives.simpo(), ref_log_probs=torch.zeros(2)),
    "lengths must be given: this objective divides log-probs by the number of tokens": pair(objective=objectives.ipo()),
    "lengths must have the shape of log_probs, [2, 3], got [3]": pair(lengths=torch.ones(3)),
    "lengths must be a torch.Tensor, got list": pair(lengths=[1, 2]),
    "lengths must be on cpu": pair(lengths=torch.ones(2, 3, device="meta")),
    "lengths must not require grad": pair(lengths=torch.ones(2, 3, requires_grad=True)),
    "the objective has pairs='given' and pair_weights is None": pair(objective=GIVEN),
    "the objective has pairs='given' and pair_weights is None ": linear(objective=GIVEN),
    "the objective has pairs='all' and pair_weights were given": pair(pair_weights=SQUARE),
    "pair_weights must be [G, k, k] with G = 2 lists, got [3, 3]": pair(objective=GIVEN, pair_weights=SQUARE[0]),
    "pair_weights must be [G, k, k] with G = 2 lists, got [1, 3, 3]": pair(objective=GIVEN, pair_weights=SQUARE[:1]),
    "pair_weights must be [G, k, k] with G = 2 lists, got [2, 3, 2]": pair(
        objective=GIVEN, pair_weights=SQUARE[:, :, :2]
    ),
    "pair_weights must be [G, k, k] with G = 1 lists, got [2, 3, 3]": linear(objective=GIVEN, pair_weights=SQUARE),
    "pair_weights must be float32, float16, bfloat16 or float64, got torch.bool": pair(
        objective=GIVEN, pair_weights=SQUARE.bool()
    ),
    "pair_weights must not require grad": pair(objective=GIVEN, pair_weights=SQUARE.clone().requires_grad_()),
    "flip_probs soften the logistic link of pairs, which this objective does not have": pair(
        objective=objectives.hinge(), flip_probs=torch.zeros(2, 3)
    ),
    "flip_probs soften the logistic link of pairs, which": linear(
        objective=objectives.sdpo(), flip_probs=torch.zeros(2)
    ),
    "flip_probs must have the shape of log_probs, [2, 3], got [2]": pair(flip_probs=torch.zeros(2)),
    "flip_probs must be [S] = [2], as cu_seqlens says, got [3]": linear(flip_probs=torch.zeros(3)),
    "flip_probs must be float32, float16, bfloat16 or float64, got torch.int64": pair(
        flip_probs=torch.zeros(2, 3, dtype=torch.long)
    ),
    "flip_probs must not require grad": pair(flip_probs=torch.zeros(2, 3, requires_grad=True)),
    "lengths must be given: this objective divides log-probs": pair(objective=objectives.mpo()),
    "ref_log_probs must be given: this objective takes ratios to the policy that sampled": pair(
        objective=objectives.gspo(), lengths=torch.ones(2, 3)
    ),
    "ref_log_probs must be given: this objective takes ratios to the": linear(objective=objectives.gspo()),
    "delta is of pointwise='bco' alone, and the objective has pointwise='none'": pair(delta=torch.zeros(1)),
    "delta must be one float, of shape [] or [1], got torch.float32 of shape [2]": pair(
        objective=objectives.bco(), delta=torch.zeros(2)
    ),
    "delta must be one float, of shape [] or [1], got torch.int64 of shape []": linear(
        objective=objectives.bco(), delta=torch.tensor(1)
    ),
    "delta must be a torch.Tensor, got float": pair(objective=objectives.bco(), delta=0.5),
    "delta must not require grad": pair(objective=objectives.bco(), delta=torch.zeros(1, requires_grad=True)),
    "delta must be finite, got nan": pair(objective=objectives.bco(), delta=torch.tensor(torch.nan)),
    "list_weights must be [G] = [2], one number a list, got [3]": pair(list_weights=torch.ones(3)),
    "list_weights must be [G] = [1], one number a list, got [2]": linear(list_weights=torch.ones(2)),
    "list_weights must be a torch.Tensor, got list": pair(list_weights=[1.0, 1.0]),
    "list_weights must be float32, float16, bfloat16 or float64, got torch.int64": pair(
        list_weights=torch.ones(2, dtype=torch.long)
    ),
    "list_weights must not require grad": pair(list_weights=torch.ones(2, requires_grad=True)),
    "list_weights must be on cpu": pair(list_weights=torch.ones(2, device="meta")),
    "list_weights must be finite and >= 0, got -1.0 at 1": pair(list_weights=torch.tensor([1.0, -1.0])),
    "list_weights must be finite and >= 0, got nan at 0": linear(list_weights=torch.tensor([torch.nan])),
    "list_weights must be finite and >= 0, got inf at 0": pair(list_weights=torch.tensor([torch.inf, 1.0])),
    "token_weights must have the shape of labels, [4], got [2]": linear(token_weights=torch.ones(2)),
    "token_weights must be a torch.Tensor, got float": linear(token_weights=0.5),
    "token_weights must be float32, float16, bfloat16 or float64, got torch.int64": linear(
        token_weights=torch.ones(T, dtype=torch.long)
    ),
    "token_weights must not require grad": linear(token_weights=torch.ones(T, requires_grad=True)),
    "token_weights must be on cpu": linear(token_weights=torch.ones(T, device="meta")),
}


@pytest.mark.parametrize(("sentence", "call"), CASES.items(), ids=[*CASES])
def test_what_does_not_go_with_the_objective_is_refused_by_name(sentence, call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert sentence.strip() in str(caught.value)


@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
def test_a_matrix_of_pairs_must_hold_the_longest_list(backend):
    small = torch.ones(1, 2, 2)
    sentence = r"pair_weights must be \[G, k, k\] with k at least 3, the longest list, got \[1, 2, 2\]"
    with pytest.raises(ValueError, match=sentence):
        loss(torch.zeros(1, 3), torch.zeros(1, 3), objective=GIVEN, pair_weights=small, backend=backend)
    given = inputs(
        rewards=torch.zeros(3), cu_seqlens=torch.tensor([0, 1, 2, T]), cu_lists=torch.tensor([0, 3]), backend=backend
    )
    for trainable in (False, True):
        given["weight"] = given["weight"].detach().requires_grad_(trainable)
        with pytest.raises(ValueError, match=sentence):
            pk.linear_perpo_loss(**given, objective=GIVEN, pair_weights=small)
