"""Numbers under torch.compile: a float that changes from step to step, or is computed from one that does."""

import shutil

import pytest
import torch

import perpo_kernels as pk

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler"
)

COMPILERS = ["aot_eager", "inductor"]
STEPS = (4.0, 8.0, 16.0, 3.0, 5.0, 6.0, 7.0, 9.0, 10.0, 11.0, 12.0)  # more than dynamo's limit of eight compilations


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


torch.manual_seed(0)
SCORES, REWARDS = torch.randn(2, 4), torch.rand(2, 4)
HIDDEN, WEIGHT, LABELS, OF_THREE = torch.randn(6, 5), torch.randn(9, 5), torch.randint(9, (6,)), torch.rand(3)
TARGETS = torch.tensor([1, 3])
CU = {"cu_seqlens": torch.tensor([0, 2, 4, 6], dtype=torch.int32), "cu_lists": torch.tensor([0, 3], dtype=torch.int32)}


def beta(x, c):
    return c * pk.perpo_loss(x, REWARDS, beta=0.1 * c)


def gamma(x, c):
    return c * pk.perpo_loss(x, REWARDS, gamma=0.1 * c)


def objective(x, c):
    return c * pk.perpo_loss(x, REWARDS, objective=pk.objectives.Objective(beta=0.1 * c, offset=0.03 * c))


def temperature(x, c):
    return c * pk.token_log_probs(x, TARGETS, temperature=0.2 * c).sum()


def linear_temperature(x, c):
    return (
        c * pk.linear_token_log_probs(x, WEIGHT, LABELS, temperature=0.2 * c, softcap=3 + c, logit_scale=0.3 * c).sum()
    )


def linear_loss(x, c):
    return c * pk.linear_perpo_loss(x, WEIGHT, LABELS, OF_THREE, **CU, beta=0.1 * c, softcap=3 + c).loss


def linear_loss_trainable(x, c):
    return c * pk.linear_perpo_loss(HIDDEN, x, LABELS, OF_THREE, **CU, beta=0.1 * c, temperature=0.2 * c).loss


CASES = [
    (beta, SCORES),
    (gamma, SCORES),
    (objective, SCORES),
    (temperature, SCORES),
    (linear_temperature, HIDDEN),
    (linear_loss, HIDDEN),
    (linear_loss_trainable, WEIGHT),
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("fn", "leaf"), CASES, ids=[fn.__name__ for fn, _ in CASES])
def test_a_new_number_a_step_is_the_one_that_is_used_and_compiles_at_most_twice(fn, leaf, compiler):
    compiled = torch.compile(fn, fullgraph=True, backend=compiler)
    for c in STEPS:
        values = []
        for run in (fn, compiled):
            x = leaf.clone().requires_grad_()
            value = run(x, c)
            values.append((value.detach(), *torch.autograd.grad(value, x)))
        for ours, plain in zip(values[1], values[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_values_of_a_beta_that_is_computed_from_the_step():
    """PyTorch's inductor keeps the first value of a float that is derived from a symbolic one; ours must not."""
    scores, rewards = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    compiled = torch.compile(lambda s, c: c * pk.perpo_loss(s, rewards, beta=0.1 * c), fullgraph=True)
    for c in (4.0, 8.0, 16.0):
        expected = c * pk.perpo_loss(scores, rewards, beta=0.1 * c, backend="reference")
        torch.testing.assert_close(compiled(scores, c), expected)
