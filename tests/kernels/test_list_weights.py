"""A weight of each list: in the loss, in every gradient and in the metrics, on every backend and API."""

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from perpo_kernels import objectives

from .family import Batch, batch, preset
from .problems import random_head
from .test_objective_family import RAGGED, close, precision

WEIGHTS = (0.5, 2.0, 0.0, 1.0, 3.0)
NAMES = ("perpo", "plackett_luce", "mdpo", "grpo", "gspo", "mpo")


@pytest.fixture
def lists(device) -> Batch:
    return batch(device, *RAGGED)


def weights(device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(WEIGHTS, dtype=dtype, device=device)


def solve(name: str, scores: Tensor, b: Batch, backend: str, list_weights: Tensor | None, reduction: str = "none"):
    leaf = scores.detach().to(precision(backend)).requires_grad_()
    b = b.to(precision(backend))
    loss = pk.perpo_loss(
        leaf, b.rewards, **b.options(name), lengths=b.lengths, objective=preset(name), list_weights=list_weights,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
def test_loss_and_gradient_of_a_list_are_multiplied_by_its_weight(backend, device, lists, name):
    scores = torch.randn(len(lists.rewards), device=device).double()
    w = weights(device)
    owner = pk.layout.owner(lists.cu_lists, len(scores))
    plain = solve(name, scores, lists, "reference", None)
    weighted = solve(name, scores, lists, backend, w.to(precision(backend)))
    close(backend, weighted[0], w * plain[0])
    close(backend, weighted[1], w[owner] * plain[1])


@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
def test_the_mean_is_over_the_number_of_lists(backend, device, lists):
    scores, w = torch.randn(len(lists.rewards), device=device).double(), weights(device, precision(backend))
    each, _ = solve("perpo", scores, lists, backend, w)
    mean, _ = solve("perpo", scores, lists, backend, w, "mean")
    total, _ = solve("perpo", scores, lists, backend, w, "sum")
    torch.testing.assert_close(mean, each.sum() / len(WEIGHTS))
    torch.testing.assert_close(total, each.sum())


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
def test_what_a_list_of_weight_zero_holds_reaches_nothing(backend, device, lists, junk):
    scores = torch.randn(len(lists.rewards), device=device).double()
    w = weights(device, precision(backend))
    start, end = lists.cu_lists[[4, 5]].tolist()
    w[4] = 0
    clean = solve("perpo", scores, lists, backend, w)
    scores[start:end] = junk
    for got, expected in zip(solve("perpo", scores, lists, backend, w), clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("chunk", [None, 256], ids=["one chunk", "chunks of lists"])
def test_hidden_states_and_head(backend, device, lists, trainable, chunk):
    """In chunks, each of which takes the weights of its own lists."""
    dtype = precision(backend)
    n = len(lists.rewards)
    cu_seqlens = pk.layout.cumulative([2] * n)
    head = random_head(2 * n, 3, 11, device, dtype)
    b, cu_lists = lists.to(dtype), lists.cu_lists.cpu()
    w = weights(device, dtype)

    def run(list_weights: Tensor | None, reduction: str) -> list[Tensor]:
        leaves = {name: getattr(head, name).clone() for name in ("hidden", "weight")}
        leaves["hidden"].requires_grad_()
        leaves["weight"].requires_grad_(trainable)
        out = pk.linear_perpo_loss(
            **leaves, labels=head.labels, rewards=b.rewards, cu_seqlens=cu_seqlens, cu_lists=cu_lists,
            ref_log_probs=b.ref, list_weights=list_weights, reduction=reduction, max_chunk_bytes=chunk, backend=backend,
        )  # fmt: skip
        loss = out.loss if list_weights is not None else (w * out.loss).sum() / len(WEIGHTS)
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]

    for got, expected in zip(run(w, "mean"), run(None, "none"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_weights_of_any_size_keep_the_gradient_of_a_half_precision_head(device, size):
    """Products with the head are of fp16; they are formed in multiples of the largest weight."""
    lists = batch(device, *RAGGED)
    head = random_head(2 * len(lists.rewards), 3, 11, device, torch.float32)
    cu_seqlens = pk.layout.cumulative([2] * len(lists.rewards), device=device)

    def gradient(dtype: torch.dtype, factor: float) -> Tensor:
        weight = head.weight.detach().clone().to(dtype).requires_grad_()
        out = pk.linear_perpo_loss(
            head.hidden.to(dtype), weight, head.labels, lists.rewards.float(), cu_seqlens=cu_seqlens,
            cu_lists=lists.cu_lists, list_weights=factor * weights(device, torch.float32), backend="eager",
        )  # fmt: skip
        (out.loss / factor).backward()
        return weight.grad.float()

    expected = gradient(torch.float32, 1.0)
    torch.testing.assert_close(gradient(torch.float16, size), expected, rtol=2e-2, atol=2e-3 * expected.abs().max())


def test_metrics_are_means_by_weight(device):
    """Over active lists, the third of which counts nothing and the fourth of which has no preference."""
    scores = torch.tensor([[0.3, 0.1], [0.2, 0.7], [9.0, -9.0], [5.0, 1.0]], device=device)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], device=device)
    w = torch.tensor([1.0, 3.0, 0.0, 7.0], device=device)
    output = pk.LinearPerPOOutput(
        scores.sum(), scores.flatten(), scores.flatten(), rewards.flatten(), torch.tensor([1.0, 1.0, 1.0, 0.0]).to(w),
        torch.tensor([0, 2, 4, 6, 8]), 0.5, w,
    )  # fmt: skip
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (1 * 0.3 + 3 * 0.2) / 4)
    assert metrics["rewards/rejected"] == pytest.approx(0.5 * (1 * 0.1 + 3 * 0.7) / 4)
    assert metrics["lists/pair_accuracy"] == pytest.approx(1 / 4)
    assert metrics["lists/active"] == pytest.approx(3 / 4)
    assert output._replace(list_weights=0 * w).metrics["rewards/chosen"] == 0
    unweighted = output._replace(list_weights=None).metrics
    for name, value in output._replace(list_weights=torch.ones_like(w)).metrics.items():
        torch.testing.assert_close(value, unweighted[name])


def test_modules_take_weights(device):
    scores, rewards = torch.randn(2, 4, device=device), torch.rand(2, 4, device=device)
    w = torch.tensor([0.5, 2.0], device=device)
    loss = pk.PerPOLoss(objective=objectives.grpo(), reduction="none")(scores, rewards, list_weights=w)
    assert torch.equal(loss, w * pk.PerPOLoss(objective=objectives.grpo(), reduction="none")(scores, rewards))


def test_the_output_holds_the_weights_that_it_was_given(device):
    """A trainer that sums over ranks and batches needs them beside the other statistics."""
    head = random_head(4, 3, 11, device, torch.float32)
    w = torch.tensor([2.0], device=device)
    options = {"cu_seqlens": torch.tensor([0, 2, 4]), "cu_lists": torch.tensor([0, 2])}
    out = pk.linear_perpo_loss(
        head.hidden, head.weight, head.labels, torch.tensor([1.0, 0.0], device=device), list_weights=w, **options
    )
    assert out.list_weights is w
