"""grad_rows_ and fused_rows_: a row's derivative D = ∂log_prob/∂raw, written over the row (or into another tensor).

    D_v = c · (1[v = y] − exp(z_v − lse)) · dz/draw,      dz/draw = pre, or pre · post · (1 − tanh²) with a soft-cap

`grad_rows_` knows lse: one read and one write of each valid row. `fused_rows_` finds log_prob and lse first: it reads the row twice,
the second time from L2 (a row is at most a few hundred kB, and one streaming multiprocessor finishes it before the
next), and writes it once. Ignored rows are not read; they are written with zeros, so that a GEMM over D needs no mask.

logits [N, V] or [B, N, V]; labels int64 [rows]; c fp32 [rows] or None for 1. Grid: one program a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.backends import LogitMap
from perpo_kernels.backends.triton.common import (
    body_bounds,
    edge_offsets,
    row_launch,
    row_max_and_sum,
    row_pointer,
    tanh_and_slope,
    to_logits,
)


@triton.jit
def derivative(raw, is_target, coefficient, shift, inverse, pre, post, SOFTCAP: tl.constexpr):
    """c · (1[target] − exp(z − shift) · inverse) · dz/draw, fp32."""
    z = raw.to(tl.float32) * pre
    slope = pre
    if SOFTCAP:
        t, sech2 = tanh_and_slope(z)
        z = t * post
        slope = sech2 * (pre * post)
    p = tl.exp(z - shift) * inverse
    return (tl.where(is_target, 1.0, 0.0) - p) * (coefficient * slope)


@triton.jit
def write_row(
    logits,
    out,
    start,
    out_start,
    V,
    label,
    coefficient,
    shift,
    inverse,
    pre,
    post,
    SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    lane = tl.arange(0, BLOCK // VEC)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    first, last = body_bounds(start, V, VEC)
    target = start + label
    whole = first + (last - first) // BLOCK * BLOCK
    to_out = out_start - start
    for at in range(first, whole, BLOCK):
        raw = tl.load(logits + at + tile)
        is_target = tile == (target - at).to(tl.int32)
        d = derivative(raw, is_target, coefficient, shift, inverse, pre, post, SOFTCAP)
        tl.store(out + (at + to_out) + tile, d.to(out.dtype.element_ty))
    if whole < last:
        inside = (lane < (last - whole) // VEC)[:, None]
        raw = tl.load(logits + whole + tile, mask=inside, other=0.0)
        is_target = tile == (target - whole).to(tl.int32)
        d = derivative(raw, is_target, coefficient, shift, inverse, pre, post, SOFTCAP)
        tl.store(out + (whole + to_out) + tile, d.to(out.dtype.element_ty), mask=inside)
    if EDGES:
        offset, inside = edge_offsets(start, first, last, V, VEC)
        raw = tl.load(logits + offset, mask=inside, other=0.0)
        d = derivative(raw, offset == target, coefficient, shift, inverse, pre, post, SOFTCAP)
        tl.store(out + offset + to_out, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def zero_row(out, start, V, EDGES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, BLOCK // VEC)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    first, last = body_bounds(start, V, VEC)
    zeros = tl.zeros([BLOCK // VEC, VEC], out.dtype.element_ty)
    for at in range(first, last, BLOCK):
        tl.store(out + at + tile, zeros, mask=(lane < (last - at) // VEC)[:, None])
    if EDGES:
        offset, inside = edge_offsets(start, first, last, V, VEC)
        tl.store(out + offset, tl.zeros([2 * VEC], out.dtype.element_ty), mask=inside)


@triton.jit
def fused_rows_kernel(
    logits,
    labels,
    log_probs,
    lse,
    V,
    n_inner,
    stride_outer,
    stride_inner,
    pre,
    post,
    ignore_index,
    SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = row_pointer(row, n_inner, stride_outer, stride_inner)
    if label == ignore_index:
        tl.store(log_probs + row, 0.0)
        tl.store(lse + row, 0.0)
        zero_row(logits, start, V, EDGES, BLOCK, VEC)
    else:
        shift, total = row_max_and_sum(logits, start, V, pre, post, SOFTCAP, EDGES, BLOCK, VEC)
        known = (label >= 0) & (label < V)
        target = to_logits(tl.load(logits + start + label, mask=known, other=0.0), pre, post, SOFTCAP)
        log_total = tl.log(total)
        tl.store(log_probs + row, tl.where(known, (target - shift) - log_total, float("nan")))
        tl.store(lse + row, shift + log_total)
        tl.debug_barrier()  # the target logit is read before its thread's neighbour overwrites it
        one = tl.where(known, 1.0, float("nan"))
        write_row(
            logits, logits, start, start, V, label, one, shift, 1.0 / total, pre, post, SOFTCAP, EDGES, BLOCK, VEC
        )


@triton.jit
def grad_rows_kernel(
    logits,
    out,
    labels,
    lse,
    coefficients,
    V,
    n_inner,
    stride_outer,
    stride_inner,
    out_stride_outer,
    out_stride_inner,
    pre,
    post,
    ignore_index,
    SOFTCAP: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    SAME_LAYOUT: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = row_pointer(row, n_inner, stride_outer, stride_inner)
    if SAME_LAYOUT:
        out_start = start
    else:
        out_start = row_pointer(row, n_inner, out_stride_outer, out_stride_inner)
    if label == ignore_index:
        zero_row(out, out_start, V, EDGES, BLOCK, VEC)
    else:
        coefficient = 1.0
        if HAS_COEFFICIENTS:
            coefficient = tl.load(coefficients + row)
        coefficient = tl.where((label >= 0) & (label < V), coefficient, float("nan"))
        shift = tl.load(lse + row)
        write_row(
            logits,
            out,
            start,
            out_start,
            V,
            label,
            coefficient,
            shift,
            1.0,
            pre,
            post,
            SOFTCAP,
            EDGES,
            BLOCK,
            VEC,
        )


def fused_rows_(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    launch = row_launch(logits)
    log_probs = torch.empty(launch.n_rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(log_probs)
    if launch.n_rows:
        fused_rows_kernel[(launch.n_rows,)](
            logits,
            labels,
            log_probs,
            lse,
            logits.shape[-1],
            *launch.layout,
            z.pre,
            z.post,
            z.ignore_index,
            SOFTCAP=z.softcap is not None,
            **launch.meta,
        )
    return log_probs, lse


def grad_rows_(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: Tensor | None, z: LogitMap, out: Tensor
) -> None:
    launch, target = row_launch(logits), row_launch(out)
    same_layout = launch.layout == target.layout
    meta = {**launch.meta, "EDGES": launch.meta["EDGES"] or target.meta["EDGES"]}
    if launch.n_rows:
        grad_rows_kernel[(launch.n_rows,)](
            logits,
            out,
            labels,
            lse,
            lse if coefficients is None else coefficients,
            logits.shape[-1],
            *launch.layout,
            *target.layout[1:],
            z.pre,
            z.post,
            z.ignore_index,
            SOFTCAP=z.softcap is not None,
            HAS_COEFFICIENTS=coefficients is not None,
            SAME_LAYOUT=same_layout,
            **meta,
        )
