"""The list_loss primitive of each backend: token log-probs and rewards -> loss, coefficients, sums, statistics."""

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.harness import peak_extra_bytes
from perpo_kernels import backends, layout, reference
from perpo_kernels.backends import ListProblem, ListResult
from perpo_kernels.objectives import Objective
from perpo_kernels.ops.lists import new_list_result

from .accuracy import assert_equal_to_rounding
from .problems import IGNORED, RAGGED, ragged_lists

OBJECTIVE = Objective(0.5, 0.5)


def token_problem(device: torch.device, lengths=RAGGED, objective=OBJECTIVE, ignored=0.2) -> ListProblem:
    lists = ragged_lists(lengths, device)
    log_probs = -2 * torch.rand(lists.n_tokens, device=device)
    labels = torch.randint(50, (lists.n_tokens,), device=device)
    labels.masked_fill_(torch.rand(lists.n_tokens, device=device) < ignored, IGNORED)
    log_probs.masked_fill_(labels == IGNORED, torch.nan)  # what stands at an ignored token is never read
    return ListProblem(
        log_probs, lists.rewards, lists.cu_lists, objective, lists.cu_seqlens, labels, ref_log_probs=lists.ref_log_probs
    )


def run(backend: str, problem: ListProblem) -> ListResult:
    result = new_list_result(problem)
    backends.load(backend).list_loss(problem, result)
    return result


def exact(p: ListProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses, coefficients, sequence_log_probs, stats by the definition in float64."""
    leaf = p.log_probs.double().requires_grad_()
    if p.cu_seqlens is None:
        sums, valid = leaf, p.valid
    else:
        kept = torch.where(p.labels != p.ignore_index, leaf, 0.0)
        sums, counts = reference.sequence_log_probs(kept, p.labels, p.cu_seqlens, p.ignore_index)
        valid = counts > 0
    ref = None if p.ref_log_probs is None else p.ref_log_probs.double()
    lists = reference.Lists(sums, p.rewards.double(), p.cu_lists, ref, valid)
    losses = reference.list_losses(lists, p.objective)
    gradient = torch.autograd.grad(losses.sum(), leaf)[0]
    return losses.detach(), gradient, sums.detach(), reference.list_stats(lists, p.objective)


def check(backend: str, p: ListProblem) -> None:
    result = run(backend, p)
    losses, coefficients, sums, stats = exact(p)
    assert_equal_to_rounding(result.losses, losses)
    real = slice(None) if p.labels is None else p.labels != p.ignore_index
    assert_equal_to_rounding(result.coefficients[real], coefficients[real])
    seen = slice(None) if p.valid is None else p.valid
    assert_equal_to_rounding(result.sequence_log_probs[seen], sums[seen], scale=10)
    assert_equal_to_rounding(result.stats, stats, scale=10)


def test_ragged_lists_of_tokens_equal_the_definition(backend, device):
    check(backend, token_problem(device))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_every_beta_and_gamma(backend, device, beta, gamma):
    check(backend, token_problem(device, objective=Objective(beta, gamma)))


@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_every_list_length_around_a_tile(backend, device, k):
    """Tiles hold 16 to 64 candidates: at a boundary a list is one tile, one more, or one less."""
    check(backend, token_problem(device, lengths=[[1] * k, [2]], ignored=0.0))


def test_a_thousand_candidates(backend, device):
    k = 300 if backend == "triton" and device.type == "cpu" else 1024  # in the interpreter five tiles must do
    p = token_problem(device, lengths=[[1] * k], ignored=0.0)
    result = run(backend, p)
    scores = (p.log_probs - p.ref_log_probs).double().requires_grad_()
    r = p.rewards.double()
    gap = (r[:, None] - r[None, :]).clamp(min=0)
    weight = gap.sqrt() / gap.sqrt().sum()
    loss = (weight * torch.nn.functional.softplus(-0.5 * (scores[:, None] - scores[None, :]))).sum()
    loss.backward()
    assert_equal_to_rounding(result.losses[0], loss.detach())
    assert_equal_to_rounding(result.coefficients, scores.grad, scale=0.01)
    assert result.coefficients.double().sum().abs() < 1e-6


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_responses_longer_than_a_tile_of_tokens(backend, device, length):
    check(backend, token_problem(device, lengths=[[length, 1, length + 1]]))


def test_uneven_lists_share_a_launch(backend, device):
    """The tile is chosen from the mean length: one long list among short ones is looped over."""
    check(backend, token_problem(device, lengths=[[1], [2], [1, 1], [1] * 40, [3]], ignored=0.0))


def test_without_a_reference(backend, device):
    check(backend, token_problem(device)._replace(ref_log_probs=None))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_layouts_of_either_integer_width(backend, device, index):
    p = token_problem(device)
    check(backend, p._replace(cu_lists=p.cu_lists.to(index), cu_seqlens=p.cu_seqlens.to(index)))


def test_per_candidate_with_valid(backend, device):
    lists = ragged_lists(RAGGED, device)
    scores = torch.randn(len(lists.rewards), device=device)
    valid = torch.rand(len(scores), device=device) < 0.7
    rewards = lists.rewards.masked_fill(~valid, torch.nan)
    log_probs = scores.masked_fill(~valid, torch.inf)
    p = ListProblem(log_probs, rewards, lists.cu_lists, Objective(1.0, 0.5), valid=valid)
    clean = p._replace(log_probs=scores, rewards=lists.rewards)
    result = run(backend, p)
    losses, coefficients, _, stats = exact(clean)
    assert_equal_to_rounding(result.losses, losses)
    assert_equal_to_rounding(result.coefficients, coefficients)
    assert_equal_to_rounding(result.stats, stats)


def test_every_token_of_a_candidate_gets_its_coefficient(backend, device):
    p = token_problem(device, ignored=0.0)
    result = run(backend, p)
    per_candidate = layout.owner(p.cu_seqlens, len(p.log_probs))
    for i in per_candidate.unique():
        assert result.coefficients[per_candidate == i].unique().numel() == 1


def test_a_run_of_lists_writes_only_its_own_part(backend, device):
    """What a chunk of whole lists relies on: the rest of the result stays as it was."""
    p = token_problem(device, ignored=0.0)
    whole = run(backend, p)
    result = ListResult(*(torch.full_like(x, 7.0) for x in whole))
    part = p._replace(cu_lists=p.cu_lists[1:4])
    views = result._replace(losses=result.losses[1:3], stats=result.stats[:, 1:3])
    backends.load(backend).list_loss(part, views)
    first, last = int(p.cu_lists[1]), int(p.cu_lists[3])
    tokens = slice(int(p.cu_seqlens[first]), int(p.cu_seqlens[last]))
    for got, full, here in (
        (result.losses, whole.losses, slice(1, 3)),
        (result.coefficients, whole.coefficients, tokens),
        (result.sequence_log_probs, whole.sequence_log_probs, slice(first, last)),
        (result.stats.t(), whole.stats.t(), slice(1, 3)),
    ):
        assert_equal_to_rounding(got[here], full[here])
        outside = torch.ones(len(got), dtype=torch.bool)
        outside[here] = False
        assert (got[outside] == 7).all()


def test_float64_stays_float64_on_eager(device):
    p = token_problem(device)
    p = p._replace(log_probs=p.log_probs.double(), rewards=p.rewards.double(), ref_log_probs=p.ref_log_probs.double())
    result = run("eager", p)
    losses, coefficients, *_ = exact(p)
    torch.testing.assert_close(result.losses, losses, rtol=1e-13, atol=1e-14)
    real = p.labels != IGNORED
    torch.testing.assert_close(result.coefficients[real], coefficients[real], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("candidates", [1024, 1023], ids=["equal lists", "ragged lists"])
def test_the_memory_of_eager_does_not_grow_with_the_number_of_lists(candidates):
    """Pairs of at most a few lists are held at once: of lists of 1024, four."""

    def step(n_lists):
        sizes = [1024] * (n_lists - 1) + [candidates]
        cu_lists = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        log_probs, rewards = -torch.rand(sum(sizes)), torch.rand(sum(sizes))
        problem = ListProblem(log_probs, rewards, cu_lists, OBJECTIVE)
        return lambda: run("eager", problem)

    assert peak_extra_bytes(step(12), "cpu") <= 1.05 * peak_extra_bytes(step(4), "cpu")
