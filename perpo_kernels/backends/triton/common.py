"""What the row kernels share: a walk along a row of any alignment in 16-byte vectors, and the map from raw to logits.

A row [V] is cut into a *body* of whole aligned 16-byte vectors and at most VEC − 1 *edge* elements on either
side of it. The body is read in tiles of [BLOCK / VEC, VEC]; its mask depends on the vector and not on the element,
so that every load and store stays 16 bytes wide for every V and every row start. Without this, a row length
that is odd makes each access 2 bytes wide.

A lane (one vector's place in the tile) keeps a running maximum and sum of its own: one rescaling exponential
per VEC elements and no exchange between threads until the row ends. Each step's loads are issued in the step
before: otherwise the assembler postpones all but one or two of a step's loads to save registers, and waits
for memory several times in each step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load and store of a thread
VECTORS = 4  # of each thread in a step along a row, all in flight at once
THREADS = 256  # of a program
CACHED_ROW_BYTES = 256  # of a row swept twice, for each thread: see row_launch
MAX_THREADS = 1024
WARP_SIZE = 64 if torch.version.hip else 32
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32


@triton.jit
def row_pointer(row, n_inner, stride_outer, stride_inner):
    """Offset in elements of a row of a [B, n_inner, V] tensor; 64-bit, since B · n_inner · V passes 2³¹."""
    outer = (row // n_inner).to(tl.int64)
    inner = (row % n_inner).to(tl.int64)
    return outer * stride_outer + inner * stride_inner


@triton.jit
def body_bounds(start, V, VEC: tl.constexpr):
    """First and last (exclusive) element of the aligned body of the row at `start`. Needs V >= VEC or VEC = 1."""
    first = (start + VEC - 1) // VEC * VEC
    last = (start + V) // VEC * VEC
    return first, last


@triton.jit
def tanh_and_slope(x):
    """tanh(x) to relative fp32 precision, and 1 − tanh²(x) without cancellation."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    x2 = x * x
    # near 0 the quotient cancels; the series to x⁹ is exact to fp32 there
    small = tl.abs(x) * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    t = tl.where(x2 < 0.0625, small, t)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(x < 0, -t, t), slope


@triton.jit
def to_unit(raw, pre, SOFTCAP: tl.constexpr):
    """u with z = u · scale for the z of `LogitMap`: raw, or tanh(pre · raw) with a soft-cap. fp32."""
    u = raw.to(tl.float32)
    if SOFTCAP:
        u, _ = tanh_and_slope(u * pre)
    return u


@triton.jit
def exp_unit(u, scale, top):
    """exp((u − top) · scale) in three instructions; tl.exp takes three more, for results too small to matter.

    The difference comes first: of large u it is exact, where that of two rounded products may be off by any amount.
    """
    return tl.exp2((u - top) * (scale * LOG2E))


@triton.jit
def lane_update(top, total, u, scale):
    """Fold u [lanes, VEC] into the running (max u, Σ exp(z − max z)) of each lane; z = u · scale, scale > 0."""
    new_top = tl.maximum(top, tl.max(u, axis=1))
    total = total * exp_unit(top, scale, new_top) + tl.sum(exp_unit(u, scale, new_top[:, None]), axis=1)
    return new_top, total


@triton.jit
def row_max_and_sum(
    base, start, V, pre, scale, SOFTCAP: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr
):
    """One read of the row: (max u, Σ exp(z − max z)), the maximum replaced by 0 if it is −inf; z = u · scale."""
    LANES: tl.constexpr = BLOCK // VEC
    lane = tl.arange(0, LANES)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full([LANES], LOWEST, tl.float32)  # finite, so that −inf − top is never NaN
    total = tl.zeros([LANES], tl.float32)
    first, last = body_bounds(start, V, VEC)
    whole = first + (last - first) // BLOCK * BLOCK
    raw = tl.load(base + first + tile, mask=all_lanes(first < whole, LANES))
    for at in range(first + BLOCK, whole + BLOCK, BLOCK):
        ahead = tl.load(base + at + tile, mask=all_lanes(at < whole, LANES))
        top, total = lane_update(top, total, to_unit(raw, pre, SOFTCAP), scale)
        raw = ahead
    if whole < last:
        inside = lane_mask(lane, whole, last, VEC)
        raw = tl.load(base + whole + tile, mask=inside, other=0.0)
        u = tl.where(inside, to_unit(raw, pre, SOFTCAP), -float("inf"))
        top, total = lane_update(top, total, u, scale)
    row_top = tl.max(top, axis=0)
    if EDGES:
        offset, inside = edge_offsets(start, first, last, V, VEC)
        raw = tl.load(base + offset, mask=inside, other=0.0)
        u = tl.where(inside, to_unit(raw, pre, SOFTCAP), -float("inf"))
        row_top = tl.maximum(row_top, tl.max(u, axis=0))
    row_total = tl.sum(total * exp_unit(top, scale, row_top), axis=0)
    if EDGES:
        row_total += tl.sum(exp_unit(u, scale, row_top), axis=0)
    return tl.where(row_total == 0.0, 0.0, row_top), row_total


@triton.jit
def all_lanes(condition, LANES: tl.constexpr):
    """[lanes, 1]: all or none. (The interpreter does not take a scalar as the mask of a block.)"""
    return tl.zeros([LANES, 1], tl.int32) < condition.to(tl.int32)


@triton.jit
def lane_mask(lane, at, last, VEC: tl.constexpr):
    """[lanes, 1]: the vectors of the tile at `at` that lie before `last`. In 32 bits; V has no more."""
    return (lane < ((last - at) // VEC).to(tl.int32))[:, None]


@triton.jit
def edge_offsets(start, first, last, V, VEC: tl.constexpr):
    """The up to 2 (VEC − 1) elements of the row outside its body: offsets [2 VEC] and which of them are there."""
    i = tl.arange(0, 2 * VEC)
    head = i < VEC
    offset = tl.where(head, start + i, last + i - VEC)
    inside = tl.where(head, offset < first, offset < start + V)
    return offset, inside


class RowLaunch(NamedTuple):
    """How a tensor of rows is handed to a row kernel."""

    n_rows: int
    layout: tuple[int, int, int]  # n_inner, stride_outer, stride_inner: arguments of `row_pointer`
    meta: dict[str, Any]  # EDGES, BLOCK, VEC, num_warps


def row_launch(logits: Tensor, sweeps: int = 1, max_threads: int = MAX_THREADS) -> RowLaunch:
    """Launch parameters for the rows of `logits` [N, V] or [B, N, V]; the last dimension must be dense.

    Rows swept twice are to be found in L2 the second time. All programs that run at once work on a row each, so
    the longer the row, the more threads it gets and the fewer run: at 64 registers per thread, 132
    multiprocessors hold 35 MB.
    """
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, "the vocabulary dimension must be contiguous"
    n_vocab, itemsize = logits.shape[-1], logits.element_size()
    n_outer, n_inner = (1, logits.shape[0]) if logits.dim() == 2 else logits.shape[:2]
    stride_outer, stride_inner = (0, logits.stride(0)) if logits.dim() == 2 else logits.stride()[:2]
    vec = VECTOR_BYTES // itemsize
    if n_vocab < 2 * vec:
        vec = 1
    edges = any(size % vec for size in (n_vocab, stride_outer, stride_inner))
    threads = THREADS
    if sweeps > 1:
        threads = min(max_threads, max(threads, triton.next_power_of_2(n_vocab * itemsize // CACHED_ROW_BYTES)))
    block = min(threads * VECTORS * vec, triton.next_power_of_2(n_vocab))
    num_warps = max(1, min(threads, block // vec) // WARP_SIZE)
    meta = {"EDGES": edges, "BLOCK": block, "VEC": vec, "num_warps": num_warps}
    return RowLaunch(n_outer * n_inner, (n_inner, stride_outer, stride_inner), meta)
