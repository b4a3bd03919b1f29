"""linear_perpo_loss: from hidden states and rewards to the loss and every gradient, in each of its algorithms."""

from itertools import pairwise

import pytest
import torch

import perpo_kernels as pk

from . import plain
from .accuracy import (
    DTYPES,
    assert_as_accurate_as_plain,
    assert_equal_to_rounding,
    interpreter_truncation,
    one_more_rounding,
)
from .problems import IGNORED, RAGGED, ragged_lists, random_head, value_and_gradients

TRAINABLE = {
    "frozen head": ("hidden",),
    "all trainable": ("hidden", "weight", "bias"),
    "frozen hidden": ("weight", "bias"),
    "only bias": ("bias",),
    "only weight": ("weight",),
}
ROW = 128  # bytes of a row of logits at V = 17, padded to cache lines
CHUNKS = {"default": None, "whole lists": 10 * ROW, "two sweeps": 3 * ROW, "a row": 1}


def build(device, dtype=torch.float32, lengths=RAGGED, n_hidden=5, n_vocab=17, ignored=0.2):
    lists = ragged_lists(lengths, device)
    head = random_head(lists.n_tokens, n_hidden, n_vocab, device, dtype, ignored)
    return head, lists


def check(
    backend, head, lists, trainable=("hidden", "weight", "bias"), reduction="mean", upstream=1.0, chunk=None, **options
):
    """Value and gradients against float64, next to plain PyTorch in the same dtype."""
    inputs = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    given = {**lists._asdict(), "labels": head.labels, **options}
    dtype, device = head.hidden.dtype, head.hidden.device

    def ours_of(**kwargs):
        return pk.linear_perpo_loss(**kwargs, reduction=reduction, backend=backend, max_chunk_bytes=chunk).loss

    def plain_of(**kwargs):
        losses = plain.linear_perpo_loss(**kwargs)
        return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]

    def exact_of(**kwargs):
        return pk.linear_perpo_loss(**kwargs, reduction=reduction, backend="reference").loss

    ours, gradients = value_and_gradients(ours_of, inputs, trainable, upstream, **given)
    peer, peer_gradients = value_and_gradients(plain_of, inputs, trainable, upstream, **given)
    doubles = {name: x.double() for name, x in inputs.items()}
    wide = {**given, "rewards": lists.rewards.double(), "ref_log_probs": lists.ref_log_probs.double()}
    exact, exact_gradients = value_and_gradients(exact_of, doubles, trainable, upstream, **wide)
    assert ours.dtype == torch.float32
    assert_as_accurate_as_plain(ours, peer, exact)
    rounding = 0.0 if dtype == torch.float32 else one_more_rounding(dtype)
    cut = interpreter_truncation(backend, dtype, device)
    for name in trainable:
        assert gradients[name].dtype == dtype
        assert_as_accurate_as_plain(
            gradients[name], peer_gradients[name], exact_gradients[name], extra=rounding + 2 * cut
        )
    return ours, gradients


@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_trainable_in_any_dtype(backend, device, trainable, dtype):
    check(backend, *build(device, dtype), trainable=trainable)


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunks_of_lists_and_two_sweeps_give_the_same(backend, device, trainable, chunk):
    head, lists = build(device)
    loss, gradients = check(backend, head, lists, trainable, chunk=chunk)
    whole_loss, whole = check(backend, head, lists, trainable)
    assert_equal_to_rounding(loss, whole_loss)
    for name, gradient in whole.items():
        assert_equal_to_rounding(gradients[name], gradient, scale=gradient.abs().max().item())


def test_two_sweeps_in_low_precision(backend, device):
    check(backend, *build(device, torch.bfloat16), chunk=3 * 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_of_many_chunks_is_summed_in_fp32(backend, device, dtype):
    """A list a chunk: rounding each partial sum to the dtype of the weight would drift away from a single product."""
    n_lists = 64 if backend == "eager" else 16
    head, lists = build(device, dtype, lengths=[[1, 1]] * n_lists, ignored=0.0)
    lists = lists._replace(cu_seqlens=lists.cu_seqlens.cpu(), cu_lists=lists.cu_lists.cpu())
    check(backend, head, lists, trainable=("weight", "bias"), chunk=2 * ROW // 2, beta=1.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_upstream_gradient_other_than_one(backend, device, reduction):
    check(backend, *build(device), reduction=reduction, upstream=-2.5)


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
def test_a_weight_for_each_list(backend, device, trainable):
    upstream = torch.tensor([1.0, 0.0, 3.0, -2.0, 0.5], device=device)
    check(backend, *build(device), trainable, reduction="none", upstream=upstream)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 1.4}], ids=str
)
@pytest.mark.parametrize("chunk", [None, 3 * ROW], ids=["one sweep", "two sweeps"])
def test_temperature_softcap_and_logit_scale(backend, device, options, chunk):
    check(backend, *build(device), chunk=chunk, **options)


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.5, 2.0)])
def test_beta_and_gamma(backend, device, beta, gamma):
    check(backend, *build(device), beta=beta, gamma=gamma)


@pytest.mark.parametrize("chunk", [None, 3 * ROW], ids=["one sweep", "two sweeps"])
@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE.keys())
def test_hidden_states_of_ignored_tokens_are_never_read(backend, device, trainable, chunk):
    head, lists = build(device, ignored=0.0)
    head.labels[[1, 4, 9]] = IGNORED
    loss, clean = check(backend, head, lists, trainable, chunk=chunk)
    dirty = head.hidden.clone()
    dirty[1], dirty[4], dirty[9] = torch.nan, torch.inf, -torch.inf
    inputs = {"hidden": dirty, "weight": head.weight, "bias": head.bias}

    def fn(**kwargs):
        return pk.linear_perpo_loss(**kwargs, backend=backend, max_chunk_bytes=chunk).loss

    got, gradients = value_and_gradients(fn, inputs, trainable, 1.0, **lists._asdict(), labels=head.labels)
    torch.testing.assert_close(got, loss)
    for name in trainable:
        torch.testing.assert_close(gradients[name], clean[name], rtol=1e-5, atol=1e-6)


def test_a_large_fp16_hidden_state_does_not_overflow_the_weight_gradient(backend, device):
    """9000 · g stays in fp16 for the true g ≤ β; a g normalised to its mean over twenty candidates does not."""
    k = 20
    head, lists = build(device, torch.float16, lengths=[[1] * k], n_hidden=4, n_vocab=11, ignored=0.0)
    hidden, weight = head.hidden.clone(), head.weight / 100
    hidden[:, 0], weight[:, 0] = 9000, 0
    head.labels[0], head.labels[-1] = 0, 1  # of the worst and the best: their shares of the gradient do not cancel
    lists = lists._replace(rewards=torch.linspace(0, 1, k, device=device), ref_log_probs=torch.zeros(k, device=device))
    check(backend, head._replace(hidden=hidden, weight=weight), lists, trainable=("weight",), gamma=100.0)


def test_small_coefficients_do_not_vanish_in_fp16(backend, device):
    """β = 1e-4 over twenty candidates: a coefficient is about 5e-6, of which fp16 would keep six bits."""
    head, lists = build(device, torch.float16, lengths=[[2] * 20], ignored=0.0)
    _, gradients = check(backend, head, lists, trainable=("weight",), beta=1e-4, upstream=1e4)
    assert gradients["weight"].abs().max() > 0


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
@pytest.mark.parametrize("lengths", [[[0, 0]], [[]], [[], []], [[], [0, 3], [2, 1], []], [[2]]], ids=str)
def test_empty_responses_and_empty_lists(backend, device, trainable, lengths):
    head, lists = build(device, lengths=lengths, ignored=0.0)
    inputs = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}

    def fn(**kwargs):
        return pk.linear_perpo_loss(**kwargs, backend=backend).loss

    loss, gradients = value_and_gradients(fn, inputs, trainable, 1.0, **lists._asdict(), labels=head.labels)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    if lengths != [[], [0, 3], [2, 1], []]:
        assert loss == 0


def test_log_probs_are_those_of_whole_responses_and_detached(backend, device):
    head, lists = build(device)
    head.hidden.requires_grad_()
    for weight in (head.weight, head.weight.clone().requires_grad_()):
        out = pk.linear_perpo_loss(head.hidden, weight, head.labels, **lists._asdict(), bias=head.bias, backend=backend)
        tokens = plain.linear_token_log_probs(head.hidden.double(), weight.double(), head.labels, head.bias.double())
        bounds = lists.cu_seqlens.tolist()
        expected = torch.stack([tokens[a:b].sum() for a, b in pairwise(bounds)])
        assert not out.log_probs.requires_grad
        assert_equal_to_rounding(out.log_probs, expected.detach(), scale=20)


@pytest.mark.parametrize("trainable", [False, True])
def test_metrics(backend, device, trainable):
    """TRL's names; from the definition in float64; detached; of active lists only."""
    head, lists = build(device)
    weight = head.weight.clone().requires_grad_(trainable)
    out = pk.linear_perpo_loss(
        head.hidden.requires_grad_(), weight, head.labels, **lists._asdict(), beta=0.4, backend=backend
    )
    wide = lists._replace(rewards=lists.rewards.double(), ref_log_probs=lists.ref_log_probs.double())
    exact = pk.linear_perpo_loss(
        head.hidden.double(), weight.double(), head.labels, **wide._asdict(), beta=0.4, backend="reference"
    )
    assert set(out.metrics) == {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "lists/pair_accuracy", "lists/active",
    }  # fmt: skip
    for name, value in out.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert_equal_to_rounding(value, exact.metrics[name], scale=20)
    margin = out.metrics["rewards/chosen"] - out.metrics["rewards/rejected"]
    torch.testing.assert_close(out.metrics["rewards/margins"], margin)


def test_layouts_of_int64_and_without_reference(backend, device):
    head, lists = build(device)
    inputs = (head.hidden, head.weight, head.labels, lists.rewards)
    a = pk.linear_perpo_loss(*inputs, cu_seqlens=lists.cu_seqlens, cu_lists=lists.cu_lists, backend=backend)
    b = pk.linear_perpo_loss(
        *inputs, cu_seqlens=lists.cu_seqlens.long(), cu_lists=lists.cu_lists.long(), backend=backend
    )
    assert torch.equal(a.loss, b.loss)


def test_a_layout_on_the_cpu_serves_tensors_on_the_device(backend, device):
    head, lists = build(device)
    lists = lists._replace(cu_seqlens=lists.cu_seqlens.cpu(), cu_lists=lists.cu_lists.cpu())
    check(backend, head, lists, chunk=10 * ROW)


def test_strided_labels_and_layouts(backend, device):
    head, lists = build(device)

    def strided(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    expected, gradients = check(backend, head, lists)
    odd = lists._replace(**{name: strided(x) for name, x in lists._asdict().items()})
    got, others = check(backend, head._replace(labels=strided(head.labels)), odd)
    torch.testing.assert_close(got, expected)
    for name in gradients:
        torch.testing.assert_close(others[name], gradients[name])


def test_a_second_backward_gives_the_same_gradients(backend, device):
    head, lists = build(device)
    for leaves in ([head.hidden], [head.hidden, head.weight]):
        for leaf in leaves:
            leaf.requires_grad_()
        loss = pk.linear_perpo_loss(head.hidden, head.weight, head.labels, **lists._asdict(), backend=backend).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
            assert torch.equal(a, b)
