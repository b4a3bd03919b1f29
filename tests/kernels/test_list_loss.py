"""The list_loss primitive of each backend: token log-probs and rewards -> loss, coefficients, what ranks candidates."""

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.harness import peak_extra_bytes
from perpo_kernels import backends, layout, reference
from perpo_kernels.objectives import Objective
from perpo_kernels.ops.lists import new_list_result
from perpo_kernels.problem import ListProblem, ListResult

from .accuracy import assert_equal_to_rounding
from .problems import IGNORED, RAGGED, ragged_lists

OBJECTIVE = Objective(0.5, 0.5)


Case = tuple[Tensor, ListProblem]  # log-probs, and everything else


def token_problem(device: torch.device, lengths=RAGGED, objective=OBJECTIVE, ignored=0.2) -> Case:
    lists = ragged_lists(lengths, device)
    log_probs = -2 * torch.rand(lists.n_tokens, device=device)
    labels = torch.randint(50, (lists.n_tokens,), device=device)
    labels.masked_fill_(torch.rand(lists.n_tokens, device=device) < ignored, IGNORED)
    log_probs.masked_fill_(labels == IGNORED, torch.nan)  # what stands at an ignored token is never read
    return log_probs, ListProblem(**lists._asdict(), labels=labels, objective=objective)


def run(backend: str, log_probs: Tensor, problem: ListProblem) -> ListResult:
    result = new_list_result(log_probs, problem)
    backends.load(backend).list_loss(log_probs, problem, result)
    return result


def exact(log_probs: Tensor, p: ListProblem) -> ListResult:
    """By the definition in float64."""
    leaf, p = log_probs.double().requires_grad_(), p.each(lambda x: x.double() if x.is_floating_point() else x)
    kept = leaf if p.labels is None else torch.where(p.labels != p.ignore_index, leaf, 0.0)
    losses = reference.list_losses(kept, p)
    gradient = torch.autograd.grad(losses.sum(), leaf)[0]
    return ListResult(losses.detach(), gradient, *reference.ranked_by(kept.detach(), p))


def assert_ranked_alike(result: ListResult, expected: ListResult, seen=slice(None)) -> None:
    """Sums and scores of the candidates that are seen, rewards and activity of all."""
    assert_equal_to_rounding(result.candidates[:2, seen], expected.candidates[:2, seen], scale=10)
    torch.testing.assert_close(result.candidates[2].double(), expected.candidates[2], equal_nan=True)
    assert torch.equal(result.active.double(), expected.active)


def check(backend: str, log_probs: Tensor, p: ListProblem) -> None:
    result, expected = run(backend, log_probs, p), exact(log_probs, p)
    assert_equal_to_rounding(result.losses, expected.losses)
    real = slice(None) if p.labels is None else p.labels != p.ignore_index
    assert_equal_to_rounding(result.coefficients[real], expected.coefficients[real])
    assert_ranked_alike(result, expected, slice(None) if p.valid is None else p.valid)


def test_ragged_lists_of_tokens_equal_the_definition(backend, device):
    check(backend, *token_problem(device))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_every_beta_and_gamma(backend, device, beta, gamma):
    check(backend, *token_problem(device, objective=Objective(beta, gamma)))


@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_every_list_length_around_a_tile(backend, device, k):
    """Tiles hold 16 to 64 candidates: at a boundary a list is one tile, one more, or one less."""
    check(backend, *token_problem(device, lengths=[[1] * k, [2]], ignored=0.0))


def test_a_thousand_candidates(backend, device):
    k = 300 if backend == "triton" and device.type == "cpu" else 1024  # in the interpreter five tiles must do
    log_probs, p = token_problem(device, lengths=[[1] * k], ignored=0.0)
    result = run(backend, log_probs, p)
    scores = (log_probs - p.ref_log_probs).double().requires_grad_()
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
    check(backend, *token_problem(device, lengths=[[length, 1, length + 1]]))


def test_uneven_lists_share_a_launch(backend, device):
    """The tile is chosen from the mean length: one long list among short ones is looped over."""
    check(backend, *token_problem(device, lengths=[[1], [2], [1, 1], [1] * 40, [3]], ignored=0.0))


def test_without_a_reference(backend, device):
    log_probs, p = token_problem(device)
    check(backend, log_probs, p._replace(ref_log_probs=None))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_layouts_of_either_integer_width(backend, device, index):
    log_probs, p = token_problem(device)
    check(backend, log_probs, p._replace(cu_lists=p.cu_lists.to(index), cu_seqlens=p.cu_seqlens.to(index)))


def test_per_candidate_with_valid(backend, device):
    lists = ragged_lists(RAGGED, device)
    scores = torch.randn(len(lists.rewards), device=device)
    valid = torch.rand(len(scores), device=device) < 0.7
    rewards = lists.rewards.masked_fill(~valid, torch.nan)
    log_probs = scores.masked_fill(~valid, torch.inf)
    p = ListProblem(rewards, lists.cu_lists, valid=valid, objective=Objective(1.0, 0.5))
    result, expected = run(backend, log_probs, p), exact(scores, p._replace(rewards=lists.rewards))
    assert_equal_to_rounding(result.losses, expected.losses)
    assert_equal_to_rounding(result.coefficients, expected.coefficients)
    assert_ranked_alike(result, expected, valid)


def test_every_token_of_a_candidate_gets_its_coefficient(backend, device):
    log_probs, p = token_problem(device, ignored=0.0)
    result = run(backend, log_probs, p)
    per_candidate = layout.owner(p.cu_seqlens, len(log_probs))
    for i in per_candidate.unique():
        assert result.coefficients[per_candidate == i].unique().numel() == 1


def test_a_run_of_lists_writes_only_its_own_part(backend, device):
    """What a chunk of whole lists relies on: the rest of the result stays as it was."""
    log_probs, p = token_problem(device, ignored=0.0)
    whole = run(backend, log_probs, p)
    result = ListResult(*(torch.full_like(x, 7.0) for x in whole))
    part = p._replace(cu_lists=p.cu_lists[1:4])
    views = result._replace(losses=result.losses[1:3], active=result.active[1:3])
    backends.load(backend).list_loss(log_probs, part, views)
    first, last = int(p.cu_lists[1]), int(p.cu_lists[3])
    tokens = slice(int(p.cu_seqlens[first]), int(p.cu_seqlens[last]))
    for got, full, here in (
        (result.losses, whole.losses, slice(1, 3)),
        (result.coefficients, whole.coefficients, tokens),
        (result.candidates[:2].t(), whole.candidates[:2].t(), slice(first, last)),
        (result.active, whole.active, slice(1, 3)),
    ):
        assert_equal_to_rounding(got[here], full[here])
        outside = torch.ones(len(got), dtype=torch.bool)
        outside[here] = False
        assert (got[outside] == 7).all()


def test_float64_stays_float64_on_eager(device):
    log_probs, p = token_problem(device)
    log_probs, p = log_probs.double(), p.each(lambda x: x.double() if x.is_floating_point() else x)
    result, expected = run("eager", log_probs, p), exact(log_probs, p)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-13, atol=1e-14)
    real = p.labels != IGNORED
    torch.testing.assert_close(result.coefficients[real], expected.coefficients[real], rtol=1e-13, atol=1e-14)
    assert result.candidates.dtype == torch.float64


@pytest.mark.parametrize("candidates", [1024, 1023], ids=["equal lists", "ragged lists"])
def test_the_memory_of_eager_does_not_grow_with_the_number_of_lists(candidates):
    """Pairs of at most a few lists are held at once: of lists of 1024, four."""

    def step(n_lists):
        sizes = [1024] * (n_lists - 1) + [candidates]
        cu_lists = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        log_probs, rewards = -torch.rand(sum(sizes)), torch.rand(sum(sizes))
        problem = ListProblem(rewards, cu_lists, objective=OBJECTIVE)
        return lambda: run("eager", log_probs, problem)

    assert peak_extra_bytes(step(12), "cpu") <= 1.05 * peak_extra_bytes(step(4), "cpu")
