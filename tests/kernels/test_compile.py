"""torch.compile(fullgraph=True): the same values and gradients, no graph break."""

import shutil

import pytest
import torch

import perpo_kernels as pk

from .problems import RAGGED, ragged_lists, random_head, random_labels


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def problem(device):
    lists = ragged_lists(RAGGED, device)
    return random_head(lists.n_tokens, 5, 17, device, torch.float32, ignored=0.2), lists


def check(fn, leaves, compiler="aot_eager", dynamic=None):
    """fn of the leaves, run as it is and compiled."""
    results = []
    for run in (fn, torch.compile(fn, fullgraph=True, backend=compiler, dynamic=dynamic)):
        copies = [x.detach().clone().requires_grad_() for x in leaves]
        value = run(*copies)
        value.sum().backward()
        results.append((value.detach(), *(x.grad for x in copies)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
def test_token_log_probs(backend, device, inplace):
    labels = random_labels(17, 2, 3, device=device, ignored=0.2)

    def fn(logits):
        return 3 * pk.token_log_probs(logits * 2, labels, inplace_backward=inplace, temperature=0.8, backend=backend)

    check(fn, [torch.randn(2, 3, 17, device=device)])


def test_linear_token_log_probs(backend, problem):
    head, _ = problem

    def fn(hidden, weight, bias):
        return pk.linear_token_log_probs(hidden * 2, weight, head.labels, bias, softcap=4.0, backend=backend).square()

    check(fn, [head.hidden, head.weight, head.bias])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_perpo_loss(backend, device, reduction):
    rewards, valid = torch.rand(2, 4, device=device), torch.rand(2, 4, device=device) < 0.8

    def fn(x):
        return 2 * pk.perpo_loss(x + 1, rewards, -x.detach(), valid=valid, reduction=reduction, backend=backend)

    check(fn, [torch.randn(2, 4, device=device)])


@pytest.mark.parametrize("trainable", [False, True])
def test_linear_perpo_loss_with_its_metrics(backend, problem, trainable):
    head, lists = problem

    def fn(hidden, weight=head.weight):
        out = pk.linear_perpo_loss(hidden * 2, weight, head.labels, **lists._asdict(), backend=backend)
        return 2 * out.loss + out.metrics["rewards/margins"]

    check(fn, [head.hidden, head.weight] if trainable else [head.hidden])


def test_modules(device, problem):
    head, lists = problem
    loss = pk.LinearPerPOLoss(backend="eager")
    check(lambda hidden: loss(hidden, head.weight, head.labels, **lists._asdict()).loss, [head.hidden])


def test_a_new_number_of_tokens_does_not_break_the_graph(device):
    compiled = torch.compile(pk.linear_token_log_probs, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_tokens in (5, 8, 13):
        head = random_head(n_tokens, 4, 11, device, torch.float32)
        got = compiled(head.hidden, head.weight, head.labels, backend="eager")
        torch.testing.assert_close(got, pk.linear_token_log_probs(*head[:2], head.labels, backend="eager"))


def test_under_autocast(device, problem):
    head, _ = problem

    def fn(hidden, weight):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return pk.linear_token_log_probs(hidden, weight, head.labels, backend="eager")

    check(fn, [head.hidden, head.weight])


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU"
)
def test_inductor(device, problem):
    head, lists = problem

    def fn(hidden):
        return 2 * pk.linear_perpo_loss(hidden * 2, head.weight, head.labels, **lists._asdict(), backend="eager").loss

    check(fn, [head.hidden], compiler="inductor")
