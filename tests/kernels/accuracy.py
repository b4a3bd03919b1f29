"""The accuracy criterion: the error against float64 is no larger than that of plain PyTorch in the same dtype.

`plain` is what a careful trainer writes (tests/kernels/plain.py). Two roundings more are allowed than plain makes:

- `SUM_ORDER`: fp32 sums and products in another order, four units of the last place of fp32, relative to the largest
  number that enters. It is a hundred times below the rounding of any low-precision result.
- half a unit of the last place of a low-precision result, for each rounding that an algorithm makes beyond plain
  PyTorch's. There is one: the gradient of a hidden state is g ⊙ U, with U rounded before and g ⊙ U after.

Both the largest error and the root mean square are compared: the first finds a wrong element, the second a bias.
"""

import torch
from torch import Tensor

SUM_ORDER = 4 * torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_more_rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to `dtype`: half a unit of the last place."""
    return torch.finfo(dtype).eps / 2


def interpreter_truncation(backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Triton's CPU interpreter cuts fp32 off to bf16 where every GPU rounds to nearest.

    Just below a number of bf16, that costs a whole unit of the last place where plain PyTorch is all but exact.
    """
    truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
    return 2 * one_more_rounding(dtype) if truncates else 0.0


def assert_as_accurate_as_plain(
    ours: Tensor, plain: Tensor, exact: Tensor, extra: float = 0.0, scale: float | None = None
) -> None:
    """|ours − exact| ≤ |plain − exact| + (SUM_ORDER + extra) · scale, as maximum and as root mean square.

    `scale` is the size of the numbers that enter; by default the size of `exact` itself. Where `exact` is not finite
    (a target logit of −inf), `ours` must hold the same.
    """
    assert ours.shape == exact.shape == plain.shape
    assert exact.dtype == torch.float64
    ours, plain = ours.detach().double(), plain.detach().double()
    exact = exact.detach()
    finite = exact.isfinite()
    torch.testing.assert_close(ours[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    assert ours.isfinite().all(), "not finite where the exact result is"
    if exact.numel() == 0:
        return
    slack = SUM_ORDER + extra
    for norm in (lambda x: x.abs().max().item(), lambda x: x.square().mean().sqrt().item()):
        allowed = norm(plain - exact) + slack * (norm(exact) if scale is None else scale)
        error = norm(ours - exact)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (plain {norm(plain - exact):.3e})"


def assert_equal_to_rounding(a: Tensor, b: Tensor, scale: float = 1.0, ulps: int = 16) -> None:
    """Equal up to a few units of the last place of the accumulation dtype, relative to numbers of size `scale`."""
    dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
    tolerance = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, check_dtype=False)
