"""Memory beyond the inputs: one chunk of logits and the gradients, whatever T · V is."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes

CHUNK = 256 << 20
SLACK = 48 << 20  # workspaces of the GEMM library, results per token


def peak_extra(step) -> int:
    step()  # compile; the GEMM library takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("n_lists", [2, 16])
@pytest.mark.parametrize("mode", ["reference", "frozen", "trainable"])
def test_fused_loss(device, mode, n_lists):
    batch = shapes.batch(device, shapes.N_NARROW, n_lists=n_lists)
    hidden = batch.head.hidden.requires_grad_()
    weight = batch.head.weight.requires_grad_(mode == "trainable")
    layout = {name: getattr(batch.lists, name).cpu() for name in ("cu_seqlens", "cu_lists")}

    def step():
        with torch.set_grad_enabled(mode != "reference"):
            out = batch.loss(hidden, weight, max_chunk_bytes=CHUNK, **layout)
            if mode != "reference":
                return torch.autograd.grad(out.loss, [x for x in (hidden, weight) if x.requires_grad])
            return out

    bound = CHUNK + SLACK
    if mode != "reference":
        bound += 2 * hidden.numel() * hidden.element_size()  # U, and the gradient made of it
    if mode == "trainable":
        bound += weight.numel() * (4 + weight.element_size())  # the fp32 sum, and the gradient made of it
        bound += hidden.numel() * hidden.element_size()  # g ⊙ X of a chunk
    logits = hidden.shape[0] * weight.shape[0] * 2
    assert n_lists == 2 or bound < 2.5 * logits
    assert peak_extra(step) <= bound


def test_from_logits_forward_takes_nothing_and_backward_in_place_nothing_more(device):
    logits = torch.randn(512, shapes.N_VOCAB, device=device, dtype=torch.bfloat16)
    labels = torch.randint(shapes.N_VOCAB, (512,), device=device)

    def forward():
        with torch.no_grad():
            return pk.token_log_probs(logits, labels)

    def in_place():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(pk.token_log_probs(leaf, labels, inplace_backward=True).sum(), leaf)

    def out_of_place():
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(pk.token_log_probs(leaf, labels).sum(), leaf)

    small = 1 << 20
    assert peak_extra(forward) <= small
    assert peak_extra(in_place) <= small
    assert peak_extra(out_of_place) <= logits.numel() * logits.element_size() + small
