"""Same inputs, same bits: no atomics, no order that depends on the scheduler."""

import pytest
import torch

import perpo_kernels as pk
from perpo.prefix.attention import prefix_attention
from perpo.prefix.layout import prefix_layout
from tests.gpu import shapes


def assert_same_bits(step, times: int = 4):
    first = step()
    for _ in range(times):
        for a, b in zip(first, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_fused_loss(device, trainable):
    batch = shapes.batch(device, shapes.N_HIDDEN)
    hidden = batch.head.hidden.requires_grad_()
    weight = batch.head.weight.requires_grad_(trainable)
    leaves = [hidden, weight] if trainable else [hidden]

    def step():
        out = batch.loss(hidden, weight, max_chunk_bytes=300 * 2 * shapes.N_VOCAB)
        return [out.loss.detach(), out.log_probs, *torch.autograd.grad(out.loss, leaves)]

    assert_same_bits(step)


def test_log_probs_from_logits(device):
    logits = torch.randn(300, shapes.N_VOCAB - 1, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(shapes.N_VOCAB - 1, (300,), device=device)

    def step():
        log_probs = pk.token_log_probs(logits, labels)
        return [log_probs.detach(), *torch.autograd.grad(log_probs.sum(), logits)]

    assert_same_bits(step)


@pytest.mark.parametrize(("n_lists", "k"), [(512, 20), (8, 1024)])
def test_list_loss(device, n_lists, k):
    log_probs = torch.randn(n_lists, k, device=device).requires_grad_()
    rewards = torch.rand(n_lists, k, device=device)

    def step():
        loss = pk.perpo_loss(log_probs, rewards)
        return [loss.detach(), *torch.autograd.grad(loss, log_probs)]

    assert_same_bits(step)


def test_attention_over_a_shared_prompt_where_deterministic_algorithms_are_asked_for(device):
    """Flash attention's backward pass adds with atomics otherwise, and its gradients then differ in the last bits."""
    layout = prefix_layout([1500], [[40] * 20])
    inputs = [torch.randn(1, heads, layout.n_tokens, 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    layout = layout.map(lambda t: t.to(device))

    def step():
        out = prefix_attention(*inputs, layout)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(step)
    finally:
        torch.use_deterministic_algorithms(False)
