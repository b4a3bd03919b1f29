"""torch.compile(fullgraph=True) with inductor: no graph break, the same numbers, and static host code stays out
of the way."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_fused_loss_after_a_compiled_layer(device, trainable):
    batch = shapes.batch(device)
    layer = torch.nn.Linear(shapes.N_NARROW, shapes.N_NARROW, device=device, dtype=torch.bfloat16)
    weight = batch.head.weight.requires_grad_(trainable)
    leaves = [*layer.parameters(), *([weight] if trainable else [])]

    def step(x):
        return batch.loss(torch.nn.functional.silu(layer(x)), weight).loss

    compiled = torch.compile(step, fullgraph=True)
    expected, got = step(batch.head.hidden), compiled(batch.head.hidden)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2**-6 * float(b.abs().max()))


def test_from_logits_to_the_list_loss(device):
    logits = torch.randn(4, 10, shapes.N_VOCAB, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(shapes.N_VOCAB, (4, 10), device=device)
    rewards = torch.rand(1, 4, device=device)

    def step(logits):
        return pk.perpo_loss(pk.token_log_probs(logits * 1.5, labels).sum(-1).view(1, 4), rewards)

    compiled = torch.compile(step, fullgraph=True)
    expected, got = step(logits), compiled(logits)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2**-7 * float(b.abs().max()))
