"""Logits of more than 2³¹ elements: the rows past the limit are the right ones, forward and backward."""

import torch

import perpo_kernels as pk
from tests.gpu import shapes
from tests.kernels.accuracy import assert_equal_to_rounding


def test_log_probs_and_gradient_of_the_last_rows(device, need_memory):
    need_memory(12)
    n_rows = shapes.BIG // shapes.N_VOCAB + 64
    assert n_rows * shapes.N_VOCAB > shapes.BIG
    logits = torch.empty(n_rows, shapes.N_VOCAB, device=device, dtype=torch.bfloat16).normal_()
    labels = torch.randint(shapes.N_VOCAB, (n_rows,), device=device)
    some = torch.tensor([0, n_rows // 2, n_rows - 65, n_rows - 2, n_rows - 1], device=device)
    exact = logits[some].double().log_softmax(-1)
    target = labels[some].unsqueeze(-1)
    expected = -exact.exp()
    expected.scatter_add_(-1, target, torch.ones_like(expected[:, :1]))

    leaf = logits.requires_grad_()
    log_probs = pk.token_log_probs(leaf, labels, inplace_backward=True)
    assert_equal_to_rounding(log_probs[some], exact.gather(-1, target).squeeze(-1), scale=16.0)
    (gradient,) = torch.autograd.grad(log_probs.sum(), leaf)
    torch.testing.assert_close(gradient[some].double(), expected, rtol=2**-8, atol=1e-9)


def test_a_chunk_of_that_size_gives_what_small_chunks_give(device, need_memory):
    """bf16 logits past 2³¹ elements inside the fused loss: one chunk of 4 GiB and more against many."""
    need_memory(12)
    n_tokens = shapes.BIG // shapes.N_VOCAB + 64
    hidden = torch.randn(n_tokens, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(shapes.N_VOCAB, 64, device=device, dtype=torch.bfloat16) / 4
    labels = torch.randint(shapes.N_VOCAB, (n_tokens,), device=device)
    results = []
    for size in (1 << 33, 1 << 28):
        log_probs = pk.linear_token_log_probs(hidden, weight, labels, max_chunk_bytes=size)
        (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
        results.append((log_probs.detach(), gradient.float()))
    # GEMMs of other sizes may add up in another order: a unit of the last place of bf16
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-6, atol=2e-3)
