"""The whole loss, forward and backward, is captured in a CUDA graph; replays see new inputs."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes


def captured(step):
    """step() run on a side stream first, as capture asks for, then captured: (graph, its static results)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_replays(step, inputs):
    graph, results = captured(step)
    for _ in range(2):
        for x in inputs:
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        got = [r.clone() for r in results]
        for a, b in zip(got, step(), strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_fused_loss(device, trainable):
    batch = shapes.batch(device)
    hidden = batch.head.hidden.requires_grad_()
    weight = batch.head.weight.requires_grad_(trainable)
    leaves = [hidden, weight] if trainable else [hidden]

    def step():
        out = batch.loss(hidden, weight)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves), *out.metrics.values()]

    assert_replays(step, [hidden])


def test_from_logits_to_the_list_loss(device):
    batch = shapes.batch(device, n_lists=1, k=5)
    n_tokens = batch.lists.n_tokens
    logits = torch.randn(n_tokens, shapes.N_VOCAB, device=device, dtype=torch.bfloat16).requires_grad_()
    sequence = pk.layout.owner(batch.lists.cu_seqlens, n_tokens)

    def step():
        tokens = pk.token_log_probs(logits, batch.head.labels)
        sums = torch.zeros_like(batch.lists.rewards).index_add(0, sequence, tokens)
        loss = pk.perpo_loss(sums, batch.lists.rewards, batch.lists.ref_log_probs, cu_lists=batch.lists.cu_lists)
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    graph, results = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    # index_add on a device adds in any order: equal up to rounding only
    for a, b in zip([r.clone() for r in results], step(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def test_padded_lists(device):
    log_probs = torch.randn(64, 20, device=device).requires_grad_()
    rewards, ref = torch.rand(64, 20, device=device), torch.randn(64, 20, device=device)

    def step():
        loss = pk.perpo_loss(log_probs, rewards, ref)
        return [loss.detach(), *torch.autograd.grad(loss, log_probs)]

    assert_replays(step, [log_probs])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_graphed_callables(device, trainable):
    """The recipe of docs/frozen_head.md: forward and backward are a replay each, with everything that varies copied."""
    batch, other = shapes.batch(device), shapes.batch(device)
    loss = pk.LinearPerPOLoss()

    def forward(hidden, weight, labels, rewards, ref_log_probs, cu_seqlens, cu_lists):
        layout = {"cu_seqlens": cu_seqlens, "cu_lists": cu_lists}
        return loss(hidden, weight, labels, rewards, ref_log_probs=ref_log_probs, **layout).loss

    def inputs(b):
        lists = (b.lists.rewards, b.lists.ref_log_probs, b.lists.cu_seqlens, b.lists.cu_lists)
        hidden, weight = b.head.hidden.clone().requires_grad_(), b.head.weight.clone().requires_grad_(trainable)
        return hidden, weight, b.head.labels, *lists

    graphed = torch.cuda.make_graphed_callables(forward, inputs(batch))
    for given in (inputs(other), inputs(batch)):
        leaves = [x for x in given[:2] if x.requires_grad]
        found, expected = graphed(*given), forward(*given)
        assert torch.equal(found, expected)
        replayed = [g.clone() for g in torch.autograd.grad(3 * found, leaves)]
        for a, b in zip(replayed, torch.autograd.grad(3 * expected, leaves), strict=True):
            assert torch.equal(a, b)


def test_a_layout_on_the_cpu_is_refused(device):
    batch = shapes.batch(device)
    layout = {"cu_seqlens": batch.lists.cu_seqlens.cpu(), "cu_lists": batch.lists.cu_lists.cpu()}
    batch.loss(batch.head.hidden, batch.head.weight, **layout)
    with pytest.raises(ValueError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        batch.loss(batch.head.hidden, batch.head.weight, **layout)
