"""cu_seqlens and cu_lists may stay on the CPU while the rest is on the GPU: the same loss and gradients, by other
chunks."""

import pytest
import torch

from tests.gpu import shapes


@pytest.mark.parametrize("chunk_rows", [None, 700, 200], ids=["one chunk", "a list a chunk", "lists swept twice"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_layout_on_the_cpu(device, trainable, chunk_rows):
    batch = shapes.batch(device, n_lists=3)
    hidden = batch.head.hidden.requires_grad_()
    weight = batch.head.weight.requires_grad_(trainable)
    leaves = [hidden, weight] if trainable else [hidden]
    chunk = None if chunk_rows is None else chunk_rows * 2 * shapes.N_VOCAB
    results = []
    for layout, size in (("cuda", None), ("cpu", chunk), ("cuda", chunk)):
        out = batch.loss(
            hidden,
            weight,
            cu_seqlens=batch.lists.cu_seqlens.to(layout),
            cu_lists=batch.lists.cu_lists.to(layout),
            max_chunk_bytes=size,
        )
        results.append([out.loss.detach(), *(g.float() for g in torch.autograd.grad(out.loss, leaves))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-7 * float(a.abs().max()))


def test_a_layout_that_does_not_fit_is_refused_for_free(device):
    batch = shapes.batch(device)
    bad = batch.lists.cu_seqlens.cpu()
    bad[-1] += 1
    with pytest.raises(ValueError, match="cu_seqlens"):
        batch.loss(batch.head.hidden, batch.head.weight, cu_seqlens=bad, cu_lists=batch.lists.cu_lists.cpu())
