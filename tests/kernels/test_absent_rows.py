"""What is absent takes part in nothing, whatever stands there: selected away, never multiplied by a zero."""

import math

import pytest
import torch

import perpo_kernels as pk

from .problems import IGNORED

V, H = 11, 6
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(params=["frozen head", "trainable head"])
def trainable(request):
    return request.param == "trainable head"


def head(device, trainable, n_tokens, dtype=torch.float32):
    hidden = torch.randn(n_tokens, H, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, H, device=device).to(dtype).requires_grad_(trainable)
    bias = torch.randn(V, device=device).to(dtype).requires_grad_(trainable)
    return hidden, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [None, 64])
def test_a_gradient_that_is_nan_at_an_ignored_token(backend, device, trainable, dtype, chunk_bytes):
    """log1p(−exp(0)) is −inf where the label is ignored: `where` keeps the loss finite, its backward pass makes NaN."""
    labels = torch.tensor([1, IGNORED, 2], device=device)
    leaves = head(device, trainable, 3, dtype)
    log_probs = pk.linear_token_log_probs(*leaves[:2], labels, leaves[2], max_chunk_bytes=chunk_bytes, backend=backend)
    torch.where(labels != IGNORED, -torch.log1p(-log_probs.exp()), 0).sum().backward()

    kept = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
    rest = pk.linear_token_log_probs(kept[0][[0, 2]], kept[1], labels[[0, 2]], kept[2], backend=backend)
    (-torch.log1p(-rest.exp())).sum().backward()
    assert leaves[0].grad[1].eq(0).all()
    for ours, expected in zip(leaves, kept, strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("bad", BAD)
def test_a_gradient_that_is_not_finite_at_an_ignored_position_of_logits(backend, device, bad):
    labels = torch.tensor([1, IGNORED, 2], device=device)
    logits = torch.randn(3, V, device=device, requires_grad=True)
    pk.token_log_probs(logits, labels, backend=backend).backward(torch.tensor([1.0, bad, 1.0], device=device))
    assert logits.grad[1].eq(0).all()
    assert logits.grad.isfinite().all()


def list_gradients(device, backend, trainable, hidden, weight, bias, **lists):
    leaves = [x.detach().clone().requires_grad_(i == 0 or trainable) for i, x in enumerate((hidden, weight, bias))]
    out = pk.linear_perpo_loss(leaves[0], leaves[1], bias=leaves[2], backend=backend, **lists)
    out.loss.sum().backward()
    return out, [x.grad for x in leaves if x.requires_grad]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("chunk_bytes", [None, 64])
def test_a_token_of_weight_zero_whose_state_is_not_finite(backend, device, trainable, bad, reduction, chunk_bytes):
    hidden, weight, bias = (x.detach() for x in head(device, trainable, 6))
    labels = torch.randint(V, (6,), device=device)
    token_weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0], device=device)
    lists = {
        "rewards": torch.tensor([1.0, 0.0, 0.5], device=device),
        "cu_lists": torch.tensor([0, 3], dtype=torch.int32, device=device),
        "cu_seqlens": torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=device),
        "reduction": reduction,
        "max_chunk_bytes": chunk_bytes,
    }
    ignored = labels.masked_fill(token_weights == 0, IGNORED)
    expected, gradients = list_gradients(
        device, backend, trainable, hidden, weight, bias, labels=ignored, token_weights=token_weights, **lists
    )
    hidden[1] = bad
    out, ours = list_gradients(
        device, backend, trainable, hidden, weight, bias, labels=labels, token_weights=token_weights, **lists
    )
    torch.testing.assert_close(out.loss, expected.loss)
    for gradient, right in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, right)
    assert ours[0][1].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("chunk_bytes", [None, 64])
def test_a_candidate_without_a_reward_whose_states_are_not_finite(
    backend, device, trainable, bad, reduction, chunk_bytes
):
    hidden, weight, bias = (x.detach() for x in head(device, trainable, 6))
    labels = torch.randint(V, (6,), device=device)
    lists = {
        "cu_lists": torch.tensor([0, 3], dtype=torch.int32, device=device),
        "reduction": reduction,
        "max_chunk_bytes": chunk_bytes,
    }
    rest = [0, 1, 4, 5]
    expected, gradients = list_gradients(
        device,
        backend,
        trainable,
        hidden[rest],
        weight,
        bias,
        labels=labels[rest],
        rewards=torch.tensor([1.0, 0.5], device=device),
        cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32, device=device),
        **{**lists, "cu_lists": torch.tensor([0, 2], dtype=torch.int32, device=device)},
    )
    hidden[2:4] = bad
    out, ours = list_gradients(
        device,
        backend,
        trainable,
        hidden,
        weight,
        bias,
        labels=labels,
        rewards=torch.tensor([1.0, math.nan, 0.5], device=device),
        cu_seqlens=torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=device),
        **lists,
    )
    torch.testing.assert_close(out.loss, expected.loss)
    assert ours[0][2:4].eq(0).all()
    torch.testing.assert_close(ours[0][rest], gradients[0])
    for gradient, right in zip(ours[1:], gradients[1:], strict=True):
        torch.testing.assert_close(gradient, right)


def test_logits_of_1e9_at_a_temperature(backend, device):
    """z = u / T rounds by 64 there: a difference of two such z is no log-probability; one of u, over T, is exact."""
    logits = torch.tensor(
        [[1e9, 0.0, 1e9], [1e9, 1e9 - 128, 0.0], [3e38, -3e38, 0.0]], device=device, requires_grad=True
    )
    log_probs = pk.token_log_probs(logits, torch.tensor([0, 1, 0], device=device), temperature=0.7, backend=backend)
    torch.testing.assert_close(log_probs.cpu(), torch.tensor([-math.log(2), -128 / 0.7, 0.0]))
    log_probs.sum().backward()
    torch.testing.assert_close(logits.grad[0].cpu(), torch.tensor([0.5, 0.0, -0.5]) / 0.7)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("trainable_bias", [False, True])
def test_fp16_at_a_loss_scale_of_65536(backend, device, trainable_bias):
    """As a gradient scaler would have it: finite wherever plain PyTorch's gradients in fp16 are, and as accurate."""
    torch.manual_seed(3)
    hidden = (torch.randn(64, H, device=device) / 8).half()
    hidden[0] *= 2**-6
    weight, bias = torch.randn(V, H, device=device).half(), torch.randn(V, device=device).half()
    labels = torch.randint(V, (64,), device=device)
    upstream = torch.full((64,), 1024.0, device=device)
    upstream[::2] *= -1.25
    upstream[0] = 65536.0 * 4  # its products are small; the number alone is past fp16

    def gradients(log_probs, dtype):
        leaves = [
            x.detach().to(dtype, copy=True).requires_grad_(trainable_bias or x is not bias)
            for x in (hidden, weight, bias)
        ]
        (log_probs(*leaves) * upstream).sum().backward()
        return [x.grad for x in leaves if x.requires_grad]

    def plain(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(wide, -1).gather(-1, labels[:, None])[:, 0]

    def fused(hidden, weight, bias):
        return pk.linear_token_log_probs(hidden, weight, labels, bias, backend=backend)

    rounding = torch.finfo(torch.float16).eps
    exact = gradients(plain, torch.float64)
    for ours, theirs, right in zip(gradients(fused, torch.half), gradients(plain, torch.half), exact, strict=True):
        fits = right.abs() < 65504 * 0.99
        assert ours[fits].isfinite().all()
        if theirs[fits].isfinite().all():
            allowed = 1.05 * (theirs - right)[fits].norm() + rounding / 2 * right[fits].norm()
            assert (ours - right)[fits].norm() <= allowed
