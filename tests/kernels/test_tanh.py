"""tanh and its slope as the kernels compute them, against float64; and log-probs under caps that saturate."""

import pytest
import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.problem import LogitMap

from . import plain
from .accuracy import assert_as_accurate_as_plain

triton = pytest.importorskip("triton", reason="triton has no package for this platform")
tl = triton.language

from perpo_kernels.backends.triton import common  # noqa: E402 - needs triton
from perpo_kernels.backends.triton.common import tanh_and_slope  # noqa: E402

EPS = torch.finfo(torch.float32).eps


@triton.jit
def tanh_kernel(x, out, slope, N: tl.constexpr, HOW: tl.constexpr):
    at = tl.arange(0, N)
    t, s = tanh_and_slope(tl.load(x + at), HOW)
    tl.store(out + at, t)
    tl.store(slope + at, s)


def run(x: Tensor) -> tuple[Tensor, Tensor]:
    out, slope = torch.empty_like(x), torch.empty_like(x)
    tanh_kernel[(1,)](x, out, slope, N=len(x), HOW=common.DIVISION)
    return out.double(), slope.double()


def numbers(device: torch.device) -> Tensor:
    small, wide = torch.logspace(-30, 1.3, 1 << 15), torch.linspace(0.0, 12.0, 1 << 15)
    return torch.cat([small, -small, wide, -wide]).to(device)


def test_tanh_is_within_four_units_of_the_last_place_everywhere(device):
    x = numbers(device)
    t, _ = run(x)
    torch.testing.assert_close(t, x.double().tanh(), rtol=4 * EPS, atol=0)


def test_the_slope_does_not_cancel_where_tanh_is_nearly_one(device):
    """1 − t² of a rounded t would be off by a unit of the last place of 1: a tenth of the slope at x = 7."""
    x = numbers(device)
    _, slope = run(x)
    torch.testing.assert_close(slope, 1 / x.double().cosh() ** 2, rtol=32 * EPS, atol=0)  # 2|x| is rounded
    assert (slope[x.abs() < 3] - 1 / x[x.abs() < 3].double().cosh() ** 2).abs().max() < 4 * EPS


def test_tanh_of_what_is_not_finite(device):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38, -3e38, 1e-45], device=device)
    t, slope = run(x)
    torch.testing.assert_close(t[[0, 1, 5, 6]], torch.tensor([1.0, -1, 1, -1]).to(t), rtol=EPS, atol=0)
    assert t[2].isnan()
    assert slope[2].isnan()
    assert t[[3, 4]].tolist() == [0.0, 0.0]
    assert slope[[3, 4, 7]].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.3, 3.0, 15.0, 60.0])
@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_a_row_under_a_soft_cap_is_as_accurate_as_plain(device, softcap, size, dtype):
    """From logits that the cap hardly changes to logits that all stand at it; half of the labels are the likeliest."""
    torch.manual_seed(0)
    logits = (size * torch.randn(12, 2000, device=device)).to(dtype)
    labels = torch.randint(2000, (12,), device=device)
    labels[::2] = logits[::2].argmax(-1)

    def with_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        log_probs = plain.token_log_probs(plain.map_logits(x, softcap), labels)
        return log_probs.detach(), torch.autograd.grad(log_probs.sum(), x)[0]

    exact, exact_gradient = with_gradient(logits.double())
    peer, peer_gradient = with_gradient(logits.float())
    z = LogitMap(softcap=softcap)
    size = max(1.0, (softcap * (logits.double() / softcap).tanh()).abs().max().item())
    kernels = backends.load("triton")
    log_probs, _ = kernels.log_prob_rows(logits, labels, z)
    assert_as_accurate_as_plain(log_probs, peer, exact, scale=size)
    gradient = logits.float()  # written in fp32, so that no rounding to bf16 hides what is off
    kernels.fused_rows_(gradient, labels, z)
    assert_as_accurate_as_plain(gradient, peer_gradient, exact_gradient)
