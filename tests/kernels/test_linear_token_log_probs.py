"""linear_token_log_probs: from hidden states to log-probs and gradients, a chunk of logits at a time."""

import pytest
import torch

import perpo_kernels as pk

from . import plain
from .accuracy import DTYPES, assert_as_accurate_as_plain, interpreter_truncation, one_more_rounding
from .problems import IGNORED, Head, random_head, value_and_gradients

TRAINABLE = {
    "frozen head": ("hidden",),
    "all trainable": ("hidden", "weight", "bias"),
    "frozen hidden": ("weight", "bias"),
    "only bias": ("bias",),
    "only weight": ("weight",),
}


def check(backend, head: Head, trainable=("hidden", "weight", "bias"), bias=True, upstream=None, chunk=None, **options):
    """Value and gradients against float64, next to plain PyTorch in the same dtype."""
    inputs = {"hidden": head.hidden, "weight": head.weight, **({"bias": head.bias} if bias else {})}
    trainable = [name for name in trainable if name in inputs]
    dtype, device = head.hidden.dtype, head.hidden.device
    if upstream is None:
        upstream = torch.randn(head.labels.shape, device=device)
    run = (trainable, upstream)
    ours, gradients = value_and_gradients(
        pk.linear_token_log_probs, inputs, *run, labels=head.labels, backend=backend, max_chunk_bytes=chunk, **options
    )
    peer, peer_gradients = value_and_gradients(
        plain.linear_token_log_probs, inputs, *run, labels=head.labels, **options
    )
    doubles = {name: x.double() for name, x in inputs.items()}
    exact, exact_gradients = value_and_gradients(
        pk.linear_token_log_probs, doubles, *run, labels=head.labels, backend="reference", **options
    )
    assert ours.dtype == torch.float32
    assert_as_accurate_as_plain(ours, peer, exact, scale=10.0)
    # D is rounded before the coefficient is multiplied in, and g ⊙ U after it
    rounding = 0.0 if dtype == torch.float32 else one_more_rounding(dtype)
    cut = interpreter_truncation(backend, dtype, device)
    # terms of dW and db of random sign add up and cancel: a rounding counts against the terms, not against their sum
    terms = upstream.flatten() * (head.labels != IGNORED).flatten()
    rows = head.hidden.nan_to_num().float().reshape(-1, head.hidden.shape[-1])
    norms = {
        "hidden": 0.0,
        "bias": terms.norm().item(),
        "weight": (terms.unsqueeze(1) * rows).norm().item(),
    }
    for name in trainable:
        got = gradients[name]
        assert got.dtype == dtype
        exact_gradient = exact_gradients[name]
        size = max([norms[name], *exact_gradient.abs().flatten().tolist()])
        assert_as_accurate_as_plain(
            got, peer_gradients[name], exact_gradient, extra=rounding + cut, scale=size if name != "hidden" else None
        )
    return ours, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_tokens", "n_hidden", "n_vocab"), [(1, 1, 1), (5, 3, 2), (6, 7, 9), (4, 33, 127), (3, 16, 301)]
)
def test_any_vocabulary_and_hidden_size(backend, device, n_tokens, n_hidden, n_vocab, dtype):
    check(backend, random_head(n_tokens, n_hidden, n_vocab, device, dtype, ignored=0.2))


@pytest.mark.parametrize("n_vocab", [4099, 20008])
def test_vocabularies_of_several_blocks(backend, device, n_vocab):
    check(backend, random_head(3, 5, n_vocab, device, torch.bfloat16))


@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE.keys())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_whatever_is_trainable(backend, device, trainable, dtype):
    check(backend, random_head(6, 7, 33, device, dtype, ignored=0.2), trainable=trainable)


OPTIONS = (
    {"temperature": 0.6},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"temperature": 1.4, "softcap": 2.0, "logit_scale": 1.5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_temperature_softcap_and_logit_scale(backend, device, options, dtype):
    check(backend, random_head(6, 7, 33, device, dtype, ignored=0.2), **options)


@pytest.mark.parametrize("chunk", [1, 2 * 33 * 4, 5 * 64 * 4, 10**9])
def test_chunks_do_not_change_the_result(backend, device, chunk):
    """One row a chunk, a few, an uneven last one, all at once."""
    head = random_head(7, 5, 33, device, torch.float32, ignored=0.2)
    check(backend, head, chunk=chunk, upstream=torch.ones(7, device=device))


def test_ignored_tokens_are_never_read(backend, device):
    head = random_head(6, 7, 33, device, torch.float32)
    head.labels[[0, 3]] = IGNORED
    expected, clean = check(backend, head)
    torch.manual_seed(0)
    dirty = head._replace(hidden=head.hidden.index_fill(0, torch.tensor([0, 3], device=device), torch.nan))
    inputs = {"hidden": dirty.hidden, "weight": dirty.weight, "bias": dirty.bias}
    got, gradients = value_and_gradients(
        pk.linear_token_log_probs, inputs, list(inputs), 1.0, labels=dirty.labels, backend=backend
    )
    torch.testing.assert_close(got, expected)
    for name in inputs:
        assert gradients[name].isfinite().all(), name
    assert (gradients["hidden"][[0, 3]] == 0).all()
    assert set(clean) == set(gradients)


def test_every_token_ignored(backend, device):
    head = random_head(3, 4, 9, device, torch.float32)
    head.labels.fill_(IGNORED)
    log_probs, gradients = check(backend, head)
    assert (log_probs == 0).all()
    assert all((g == 0).all() for g in gradients.values())


def test_no_tokens(backend, device):
    head = random_head(0, 4, 9, device, torch.float32)
    log_probs, gradients = check(backend, head)
    assert log_probs.shape == (0,)
    assert (gradients["weight"] == 0).all()


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 2, 3)], ids=str)
def test_any_leading_shape(backend, device, leading):
    head = random_head(6 if leading else 1, 5, 17, device, torch.float32)
    check(backend, head._replace(hidden=head.hidden.view(*leading, 5), labels=head.labels.view(leading)))


def test_strided_hidden_weight_and_labels(backend, device):
    head = random_head(6, 5, 17, device, torch.float32)
    options = {"backend": backend}
    expected = pk.linear_token_log_probs(head.hidden, head.weight, head.labels, **options)
    wide = torch.stack([head.labels, torch.zeros_like(head.labels)], -1)[:, 0]
    tall = torch.stack([head.hidden, head.hidden * 2], 1)[:, 0]
    got = pk.linear_token_log_probs(tall, head.weight.t().contiguous().t(), wide, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_padded_vocabulary_counts_as_logits(backend, device):
    """Rows of the weight that no label uses are part of the softmax, as in the model that has them."""
    head = random_head(4, 5, 64, device, torch.float32)
    check(backend, head._replace(labels=head.labels % 50))


def test_tied_embeddings_get_both_gradients(backend, device):
    weight = torch.randn(19, 6, device=device)
    tokens, labels = torch.randint(19, (5,), device=device), torch.randint(19, (5,), device=device)
    gradients = []
    for function in (pk.linear_token_log_probs, plain.linear_token_log_probs):
        leaf = weight.clone().requires_grad_()
        options = {"backend": backend} if function is pk.linear_token_log_probs else {}
        function(leaf[tokens], leaf, labels, **options).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_second_backward_gives_the_same_gradients(backend, device):
    head = random_head(5, 4, 17, device, torch.float32, ignored=0.2)
    leaves = [x.requires_grad_() for x in (head.hidden, head.weight, head.bias)]
    loss = pk.linear_token_log_probs(head.hidden, head.weight, head.labels, head.bias, backend=backend).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_under_no_grad_nothing_is_attached(backend, device):
    head = random_head(5, 4, 17, device, torch.float32)
    head.hidden.requires_grad_()
    expected = pk.linear_token_log_probs(head.hidden, head.weight, head.labels, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = pk.linear_token_log_probs(head.hidden, head.weight, head.labels, backend=backend)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected)


def test_huge_hidden_states_stay_as_accurate_as_plain(backend, device):
    """Logits of ±1e4: the fused derivative is exp(z − max), not exp(z − lse)."""
    head = random_head(5, 8, 33, device, torch.float32)
    check(
        backend, head._replace(hidden=head.hidden * 2500), upstream=torch.ones(5, device=device), trainable=("hidden",)
    )
