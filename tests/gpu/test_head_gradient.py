"""dW of low-precision factors is summed in fp32: products are not rounded before they are added, nor between chunks."""

import pytest
import torch

from perpo_kernels.chunks import add_product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_added_to_an_fp32_sum_without_rounding(device, dtype):
    out = torch.randn(1000, 96, device=device)
    before = out.clone()
    a, b = torch.randn(640, 1000, device=device, dtype=dtype), torch.randn(640, 96, device=device, dtype=dtype)
    add_product(out, a.t(), b)
    exact = before.double() + a.double().t() @ b.double()
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-5  # rounding the product to bf16 once would make 2e-3


def test_many_small_products_lose_nothing(device):
    """256 chunks whose shares are below half a unit of the last place of bf16 at the sum."""
    out = torch.full((64, 32), 256.0, device=device)
    a = torch.full((128, 64), 2.0**-4, device=device, dtype=torch.bfloat16)
    b = torch.full((128, 32), 2.0**-4, device=device, dtype=torch.bfloat16)
    for _ in range(256):
        add_product(out, a.t(), b)  # + 0.5
    assert torch.equal(out, torch.full_like(out, 256.0 + 128.0))


def test_the_sum_may_be_a_view_and_the_factors_padded_rows(device):
    """As the chunk buffer gives them: rows of a longer stride."""
    out = torch.zeros(2, 1000, 96, device=device)[1]
    padded = torch.randn(64, 1032, device=device, dtype=torch.bfloat16)[:, :1000]
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    add_product(out, padded.t(), x)
    torch.testing.assert_close(out.double(), padded.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
