"""Offsets of rows are 64-bit: logits pass 2³¹ elements in real use (14 000 tokens at V = 152 064)."""

import pytest
import torch

from perpo_kernels import backends
from perpo_kernels.problem import LogitMap

triton = pytest.importorskip("triton", reason="triton has no package for this platform")
tl = triton.language

from perpo_kernels.backends.triton.common import (  # noqa: E402 - needs triton
    body_bounds,
    edge_offsets,
    row_launch,
    row_pointer,
)


@triton.jit
def offsets_kernel(out, n_inner, stride_outer, stride_inner, V, N_ROWS: tl.constexpr, VEC: tl.constexpr):
    """For each row: its start, the bounds of its aligned body, and the last element of its edges."""
    for i in range(N_ROWS):
        row = tl.load(out + 4 * i).to(tl.int32)  # as tl.program_id gives it
        start = row_pointer(row, n_inner, stride_outer, stride_inner)
        first, last = body_bounds(start, V, VEC)
        offset, inside = edge_offsets(start, first, last, V, VEC)
        tl.store(out + 4 * i, start)
        tl.store(out + 4 * i + 1, first)
        tl.store(out + 4 * i + 2, last)
        tl.store(out + 4 * i + 3, tl.max(tl.where(inside, offset, start), axis=0))


@pytest.mark.parametrize(
    ("n_inner", "stride_outer", "stride_inner", "n_vocab"),
    [
        (1_000_000, 0, 152_064, 152_064),  # [T, V]: 1.5e11 elements
        (4_096, 4_097 * 152_063, 152_063, 152_063),  # logits[:, :-1] of [B, 4097, V], odd V
        (7, 2**40 + 8, 2**33 + 1, 301),  # strides that are themselves past 32 bits
    ],
)
def test_row_offsets_past_two_to_the_31_are_exact(device, n_inner, stride_outer, stride_inner, n_vocab):
    rows = [0, 1, 6, 14_122, 14_123, 65_535, 999_999]  # 14 123 · 152 064 is the first product past 2³¹
    out = torch.zeros(len(rows), 4, dtype=torch.int64, device=device)
    out[:, 0] = torch.tensor(rows)
    offsets_kernel[(1,)](out, n_inner, stride_outer, stride_inner, n_vocab, N_ROWS=len(rows), VEC=8)
    for row, got in zip(rows, out.tolist(), strict=True):
        start = (row // n_inner) * stride_outer + (row % n_inner) * stride_inner
        first, last = -(-start // 8) * 8, (start + n_vocab) // 8 * 8
        edge = start + n_vocab - 1 if last < start + n_vocab else max(start, first - 1)
        assert got == [start, first, last, edge]


def test_strides_reach_the_kernel_as_they_are():
    """A meta tensor of 2³³ elements has a layout and no memory."""
    logits = torch.empty(4, 14_200, 152_064, dtype=torch.bfloat16, device="meta")[:, :-1]
    launch = row_launch(logits)
    assert launch.n_rows == 4 * 14_199
    assert launch.layout == (14_199, 14_200 * 152_064, 152_064)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_body_and_edges_cover_each_row_exactly_once(device, dtype):
    """Every element is counted once, at every length and start: Σ exp over zeros is the number of columns."""
    kernels = backends.load("triton")
    label = torch.zeros(1, dtype=torch.long, device=device)
    for n_vocab in (*range(1, 20), 31, 33, 257):
        wide = torch.zeros(2, n_vocab + 5, device=device, dtype=dtype)
        for start in (0, 1, 5):
            _, lse = kernels.log_prob_rows(wide[1:, start : start + n_vocab], label, LogitMap())
            assert lse[0].item() == 0
            assert lse[1].exp().item() == pytest.approx(n_vocab, rel=1e-5)
