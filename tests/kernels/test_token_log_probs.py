"""token_log_probs: log-probs from logits that the caller holds, and their gradient."""

import pytest
import torch

import perpo_kernels as pk

from . import plain
from .accuracy import DTYPES, assert_as_accurate_as_plain, interpreter_truncation
from .problems import IGNORED, random_labels, value_and_gradients


def check(backend, logits, labels, upstream=1.0, view=lambda x: x, **options):
    """Value and gradient of pk.token_log_probs(view(logits)) against float64, next to plain PyTorch in its dtype."""

    def ours_of(logits):
        return pk.token_log_probs(view(logits), labels, backend=backend, **options)

    def plain_of(logits):
        return plain.token_log_probs(view(logits), labels, options.get("temperature", 1.0))

    ours, gradient = value_and_gradients(ours_of, {"logits": logits}, ["logits"], upstream)
    peer, peer_gradient = value_and_gradients(plain_of, {"logits": logits}, ["logits"], upstream)
    exact, exact_gradient = value_and_gradients(plain_of, {"logits": logits.double()}, ["logits"], upstream)
    assert ours.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient["logits"].dtype == logits.dtype
    assert_as_accurate_as_plain(ours, peer, exact, scale=max(1.0, view(logits).abs().max().item()))
    cut = interpreter_truncation(backend, logits.dtype, logits.device)
    lse_rounding = 1e-6  # lse of size 8 in fp32
    assert_as_accurate_as_plain(
        gradient["logits"], peer_gradient["logits"], exact_gradient["logits"], extra=cut + lse_rounding
    )
    return ours, gradient["logits"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 301), (2, 3, 9), (2, 1, 2, 33), (7,)], ids=str)
def test_any_leading_shape(backend, device, shape, dtype):
    logits = torch.randn(shape, device=device).to(dtype)
    labels = random_labels(shape[-1], *shape[:-1], device=device, ignored=0.2)
    check(backend, logits, labels, upstream=torch.randn(labels.shape, device=device))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_reaches_value_and_gradient(backend, device, temperature):
    logits = torch.randn(4, 65, device=device)
    check(backend, logits, random_labels(65, 4, device=device), upstream=0.3, temperature=temperature)


VIEWS = {
    "shifted [:, :-1]": lambda x: x[:, :-1],
    "vocabulary cut": lambda x: x[..., 3:],
    "every second position": lambda x: x[:, ::2],
    "batch and time swapped": lambda x: x.transpose(0, 1),
    "four dimensions, swapped": lambda x: x.unflatten(1, (2, 2)).transpose(0, 1),
    "vocabulary not dense": lambda x: x.transpose(1, 2),
    "matrix transposed": lambda x: x[0].t(),
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "flipped": lambda x: x.flip(-1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_is_taken_as_it_is(backend, device, view, dtype):
    """Whatever the strides, the gradient arrives at the tensor behind the view, and only there."""
    logits = torch.randn(3, 4, 37, device=device).to(dtype)
    shape = view(logits).shape
    labels = random_labels(shape[-1], *shape[:-1], device=device, ignored=0.1)
    check(backend, logits, labels, upstream=torch.randn(shape[:-1], device=device), view=view)


def test_labels_of_any_stride(backend, device):
    logits = torch.randn(6, 33, device=device)
    wide = random_labels(33, 6, 3, device=device)
    check(backend, logits, wide[:, 1])
    check(backend, logits, wide[:1, :1].expand(6, 1)[:, 0])
    check(backend, logits.view(2, 3, 33), wide[:3, :2].t())


def test_an_upstream_gradient_of_any_stride_and_dtype(backend, device):
    logits = torch.randn(6, 33, device=device, requires_grad=True)
    labels = random_labels(33, 6, device=device)
    upstream = torch.randn(6, 2, device=device)[:, 0]
    gradients = []
    for g in (upstream, upstream.contiguous()):
        (gradient,) = torch.autograd.grad(pk.token_log_probs(logits, labels, backend=backend), logits, g)
        gradients.append(gradient)
    (mean,) = torch.autograd.grad(pk.token_log_probs(logits, labels, backend=backend).mean(), logits)
    (plain_mean,) = torch.autograd.grad(plain.token_log_probs(logits, labels).mean(), logits)
    assert torch.equal(*gradients)
    torch.testing.assert_close(mean, plain_mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_ignored_positions_are_never_read_and_get_zero(backend, device, junk):
    logits = torch.randn(2, 4, 33, device=device)
    labels = random_labels(33, 2, 4, device=device)
    labels[:, 1] = IGNORED
    logits[:, 1] = junk
    leaf = logits.requires_grad_()
    log_probs = pk.token_log_probs(leaf, labels, backend=backend)
    log_probs.sum().backward()
    assert (log_probs[:, 1] == 0).all()
    assert (leaf.grad[:, 1] == 0).all()
    assert leaf.grad.isfinite().all()


def test_a_different_ignore_index(backend, device):
    logits = torch.randn(3, 9, device=device, requires_grad=True)
    labels = torch.tensor([2, 7, 2], device=device)
    log_probs = pk.token_log_probs(logits, labels, ignore_index=2, backend=backend)
    log_probs.sum().backward()
    assert (log_probs == 0).tolist() == [True, False, True]
    assert (logits.grad == 0).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)], ids=str)
def test_no_positions(backend, device, shape):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    log_probs = pk.token_log_probs(logits, torch.zeros(shape[:-1], dtype=torch.long, device=device), backend=backend)
    log_probs.sum().backward()
    assert log_probs.shape == shape[:-1]
    assert logits.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_give_fp32_log_probs(backend, device, dtype):
    """The result is that of fp32 arithmetic on the rounded logits, not rounded itself."""
    logits = (5 * torch.randn(4, 501, device=device)).to(dtype)
    labels = random_labels(501, 4, device=device)
    ours = pk.token_log_probs(logits, labels, backend=backend)
    exact = plain.token_log_probs(logits.double(), labels)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


def test_huge_logits_have_as_accurate_gradients_as_plain(backend, device):
    """lse near 1e4 has a spacing of 1e-3 in fp32; exp(z − lse) must not inherit it."""
    logits = torch.randint(-8, 9, (3, 301), device=device).float() + 1e4
    labels = random_labels(301, 3, device=device)
    leaf, peer, exact = (x.clone().requires_grad_() for x in (logits, logits, logits.double()))
    pk.token_log_probs(leaf, labels, backend=backend).sum().backward()
    plain.token_log_probs(peer, labels).sum().backward()
    plain.token_log_probs(exact, labels).sum().backward()
    assert_as_accurate_as_plain(leaf.grad, peer.grad, exact.grad)


def test_retained_graph_gives_the_same_gradient_twice(backend, device):
    logits = torch.randn(3, 33, device=device, requires_grad=True)
    loss = pk.token_log_probs(logits, random_labels(33, 3, device=device), backend=backend).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_no_grad_and_inference_mode(backend, device):
    logits = torch.randn(3, 33, device=device, requires_grad=True)
    labels = random_labels(33, 3, device=device)
    expected = pk.token_log_probs(logits, labels, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            log_probs = pk.token_log_probs(logits, labels, backend=backend)
        assert not log_probs.requires_grad
        assert torch.equal(log_probs, expected)
