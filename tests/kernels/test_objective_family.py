"""Every objective of the family against its formula (tests/kernels/family.py): values and gradients, each backend."""

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

from . import plain
from .accuracy import assert_equal_to_rounding
from .family import NAMES, Batch, batch, definition, preset
from .problems import IGNORED, random_head

RAGGED = (
    [0.7, 0.1],
    [0.5],
    [0.9, 0.4, 0.9, 0.1, 0.4, 0.1],  # ties for the best, in the middle and for the worst
    [0.3, 0.3, 0.3],
    [0.2, 0.8, 0.6, 0.4],
)
UPSTREAM = (1.0, 2.0, -0.5, 3.0, 0.7)


@pytest.fixture
def lists(device) -> Batch:
    b = batch(device, *RAGGED)
    b.valid[-3] = False
    b.rewards[-1] = torch.nan
    return b


def precision(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


def close(backend: str, got: Tensor, exact: Tensor) -> None:
    """float64 to 1e-10; fp32 to a few units of the last place of the largest number."""
    assert got.dtype == precision(backend)
    if backend == "triton":
        assert_equal_to_rounding(got, exact, scale=max(1.0, exact.abs().max().item()))
    else:
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def solve(name: str, scores: Tensor, b: Batch, backend: str, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().to(precision(backend)).requires_grad_()
    b = b.to(precision(backend))
    losses = pk.perpo_loss(
        leaf, b.rewards, **b.options(name), valid=b.valid, lengths=b.lengths, objective=preset(name),
        reduction="none", backend=backend,
    )  # fmt: skip
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), leaf.grad


def exact(name: str, scores: Tensor, b: Batch, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().double().requires_grad_()
    losses = definition(name, leaf, b)
    losses.backward(upstream)
    return losses.detach(), leaf.grad


def check(name: str, scores: Tensor, b: Batch, backend: str, upstream: Tensor) -> None:
    got, expected = solve(name, scores, b, backend, upstream), exact(name, scores, b, upstream)
    for ours, theirs in zip(got, expected, strict=True):
        close(backend, ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
def test_log_probs_of_ragged_lists(backend, device, lists, name):
    scores = (2 * torch.randn(len(lists.rewards), device=device)).double()
    check(name, scores, lists, backend, torch.tensor(UPSTREAM, device=device).double())


@pytest.mark.parametrize("name", ["perpo", "lipo", "plackett_luce", "mdpo"])
def test_a_list_longer_than_a_tile(backend, device, name):
    """The kernel takes 64 candidates at a time; ranks and denominators are of the whole list."""
    b = batch(device, (torch.randint(9, (70,)) / 8).tolist(), [0.5, 0.25])
    scores = torch.randn(72, device=device).double()
    check(name, scores, b, backend, torch.ones(2, device=device).double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_hidden_states_of_ragged_lists(backend, device, lists, name, trainable):
    """With a weight for each token, some tokens ignored and one response without a valid token."""
    counts = [int(n) for n in lists.lengths]
    cu_seqlens = pk.layout.cumulative(counts, device=device)
    head = random_head(sum(counts), 3, 11, device, torch.float64)
    head.labels[:: max(len(counts) // 2, 1)] = IGNORED
    head.labels[cu_seqlens[8] : cu_seqlens[9]] = IGNORED  # one of the two that are tied for worst in the third list
    weights = torch.rand(len(head.labels), device=device).double() + 0.5
    names = ("hidden", "weight") if trainable else ("hidden",)

    leaves = {n: getattr(head, n).clone().requires_grad_(n in names) for n in ("hidden", "weight")}
    tokens = plain.linear_token_log_probs(**leaves, labels=head.labels) * weights
    owner = pk.layout.owner(cu_seqlens, len(head.labels))
    n_valid = torch.zeros_like(lists.lengths).index_add(0, owner, (head.labels != IGNORED).double())
    sums = torch.zeros_like(lists.lengths).index_add(0, owner, tokens)
    # here a candidate is left out by having no token or no reward, and not by `valid`
    there = lists._replace(lengths=n_valid, valid=n_valid > 0)
    expected = definition(name, sums, there).mean()
    expected.backward()

    dtype = precision(backend)
    b = there.to(dtype)
    ours = {n: x.detach().to(dtype).requires_grad_(x.requires_grad) for n, x in leaves.items()}
    out = pk.linear_perpo_loss(
        **ours, labels=head.labels, rewards=b.rewards, cu_seqlens=cu_seqlens, **b.options(name),
        token_weights=weights.to(dtype), objective=preset(name), backend=backend,
    )  # fmt: skip
    out.loss.backward()
    close(backend, out.loss.detach(), expected.detach())
    assert_equal_to_rounding(out.log_probs, sums.detach(), scale=20)
    for n in names:
        close(backend, ours[n].grad, leaves[n].grad)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(device, lists, name):
    scores = torch.randn(len(lists.rewards), device=device).double().requires_grad_()

    def fn(x: Tensor) -> Tensor:
        return pk.perpo_loss(
            x, lists.rewards, **lists.options(name), valid=lists.valid, lengths=lists.lengths, objective=preset(name),
            backend="eager",
        )  # fmt: skip

    assert torch.autograd.gradcheck(fn, (scores,))


MIXTURES = {
    "best against the rest": Objective(0.4, 1.5, pairs="best_vs_rest"),
    "a weighted mean of given pairs": Objective(0.4, pairs="given", weight="uniform", link="hinge"),
    "every kind of term": Objective(
        0.4, 1.5, normalize="none", list_term="plackett_luce", pointwise="nca", target_temperature=0.3, nll=0.2
    ),
    "a pair and a list term with a margin": Objective(
        0.4, weight="lambda", normalize="pairs", offset=0.3, log_margin=0.2, list_term="softmax", nll=0.1
    ),
    "squared pairs of means": Objective(0.4, 2.0, link="squared", normalize="pairs", length_normalized=True),
}


@pytest.mark.parametrize("objective", MIXTURES.values(), ids=MIXTURES.keys())
def test_fields_combine(backend, device, lists, objective):
    """No preset: here the definition is `perpo_kernels.reference`, which the tests above hold to the formulas."""
    scores, results = torch.randn(len(lists.rewards), device=device).double(), []
    for name in (backend, "reference"):
        dtype = precision(name)
        b, leaf = lists.to(dtype), scores.to(dtype).requires_grad_()
        losses = pk.perpo_loss(
            leaf, b.rewards, b.ref, cu_lists=b.cu_lists, valid=b.valid, lengths=b.lengths, objective=objective,
            pair_weights=b.given if objective.pairs == "given" else None, reduction="none", backend=name,
        )  # fmt: skip
        losses.sum().backward()
        results.append((losses.detach(), leaf.grad))
    for got, expected in zip(*results, strict=True):
        close(backend, got, expected)


@pytest.mark.parametrize("name", ["dpo", "sdpo", "mdpo"])
def test_modules_take_any_objective(device, lists, name):
    options = lists.options(name)
    scores = torch.randn(len(lists.rewards), device=device).double()
    module = pk.PerPOLoss(objective=preset(name), backend="eager")
    expected = pk.perpo_loss(scores, lists.rewards, **options, objective=preset(name), backend="eager")
    assert torch.equal(module(scores, lists.rewards, **options), expected)


def test_the_default_objective_is_perpo(backend, device):
    scores, rewards = torch.randn(2, 4, device=device), torch.rand(2, 4, device=device)
    default = pk.perpo_loss(scores, rewards, backend=backend)
    assert torch.equal(pk.perpo_loss(scores, rewards, objective=objectives.perpo(), backend=backend), default)
