"""grad_rows_, fused_rows_, clear_rows_: a row's derivative D = ∂log_prob/∂raw, over the row or into another tensor.

    D_v = c · (1[v = y] − exp((u_v − m) · scale − l)) · dz/draw
    dz/draw = pre, or pre · post · (1 − tanh²) with a soft-cap

`grad_rows_` knows lse = (m, l): one read and one write of each valid row. `fused_rows_` finds log_prob and lse first:
it reads the row twice, the second time from L2, and writes it once. Ignored rows, and those whose coefficient is 0, are
not read; they are written with zeros, so that a GEMM over D needs no mask. `clear_rows_` writes such zeros alone, for
a D that was made before its coefficients were known.

logits [N, V] or [B, N, V]; labels int64 [rows]; c fp32 [rows] or None for 1. Grid: one program per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.backends.triton import common
from perpo_kernels.backends.triton.common import (
    all_lanes,
    body_bounds,
    edge_offsets,
    exp_unit,
    lane_mask,
    launch,
    row_launch,
    row_max_and_sum,
    row_pointer,
    rows_at_once,
    tanh_and_slope,
    to_unit,
)
from perpo_kernels.problem import LogitMap


@triton.jit
def softmax_term(raw, top, weight, pre, scale, SOFTCAP: tl.constexpr):
    """weight · exp((u − top) · scale), times 1 − tanh² with a soft cap; fp32."""
    u = raw.to(tl.float32)
    w = weight
    if SOFTCAP is not None:
        u, sech2 = tanh_and_slope(u * pre, SOFTCAP)
        w = sech2 * weight
    return exp_unit(u, scale, top) * w


@triton.jit
def write_row(
    logits,
    out,
    start,
    out_start,
    V,
    label,
    coefficient,
    top,
    inverse,
    pre,
    post,
    SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    DROP: tl.constexpr,
):
    """D of the row: −c · p · dz/draw everywhere, then the target's element once more, with its 1.

    That one extra store saves a comparison and a selection for each element of the row. From the row's end to
    its start: what the sweep before this one read last is what L2 still holds.
    """
    LANES: tl.constexpr = BLOCK // VEC
    scale = post if SOFTCAP is not None else pre
    slope = pre * post if SOFTCAP is not None else pre
    weight = -coefficient * inverse * slope
    known = (label >= 0) & (label < V)
    raw_target = tl.load(logits + start + label, mask=known, other=0.0)
    tl.debug_barrier()  # every thread has read the target's logit before one of them overwrites it

    lane = tl.arange(0, LANES)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    first, last = body_bounds(start, V, VEC)
    whole = first + (last - first) // BLOCK * BLOCK
    to_out = out_start - start
    if whole < last:
        inside = lane_mask(lane, whole, last, VEC)
        raw = tl.load(logits + whole + tile, mask=inside, other=0.0, eviction_policy=DROP)
        d = softmax_term(raw, top, weight, pre, scale, SOFTCAP)
        tl.store(out + (whole + to_out) + tile, d.to(out.dtype.element_ty), mask=inside, eviction_policy=DROP)
    raw = tl.load(logits + (whole - BLOCK) + tile, mask=all_lanes(first < whole, LANES), eviction_policy=DROP)
    for back in range(BLOCK, whole - first + BLOCK, BLOCK):
        at = whole - back
        ahead = tl.load(logits + (at - BLOCK) + tile, mask=all_lanes(first < at, LANES), eviction_policy=DROP)
        d = softmax_term(raw, top, weight, pre, scale, SOFTCAP)
        tl.store(out + (at + to_out) + tile, d.to(out.dtype.element_ty), eviction_policy=DROP)
        raw = ahead
    if EDGES:
        offset, inside = edge_offsets(start, first, last, V, VEC)
        raw = tl.load(logits + offset, mask=inside, other=0.0)
        d = softmax_term(raw, top, weight, pre, scale, SOFTCAP)
        tl.store(out + offset + to_out, d.to(out.dtype.element_ty), mask=inside)

    tl.debug_barrier()  # of the two stores to the target's element, this is the later
    u = raw_target.to(tl.float32)
    if SOFTCAP is not None:
        u, sech2 = tanh_and_slope(u * pre, SOFTCAP)
        slope *= sech2
    d = coefficient * slope * (1.0 - exp_unit(u, scale, top) * inverse)
    tl.store(out + out_start + label, d.to(out.dtype.element_ty), mask=known)


@triton.jit
def zero_row(out, start, V, EDGES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, BLOCK // VEC)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    first, last = body_bounds(start, V, VEC)
    zeros = tl.zeros([BLOCK // VEC, VEC], out.dtype.element_ty)
    for at in range(first, last, BLOCK):
        tl.store(out + at + tile, zeros, mask=lane_mask(lane, at, last, VEC))
    if EDGES:
        offset, inside = edge_offsets(start, first, last, V, VEC)
        tl.store(out + offset, tl.zeros([2 * VEC], out.dtype.element_ty), mask=inside)


@triton.jit
def clear_rows_kernel(
    logits,
    coefficients,
    V,
    n_inner,
    stride_outer,
    stride_inner,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(coefficients + row) == 0.0:
        zero_row(logits, row_pointer(row, n_inner, stride_outer, stride_inner), V, EDGES, BLOCK, VEC)


@triton.jit(do_not_specialize=["n_rows"])
def fused_rows_kernel(
    logits,
    labels,
    log_probs,
    lse,
    n_rows,
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
    KEEP: tl.constexpr,
    DROP: tl.constexpr,
):
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        label = tl.load(labels + row)
        start = row_pointer(row, n_inner, stride_outer, stride_inner)
        if label == ignore_index:
            tl.store(log_probs + row, 0.0)
            tl.store(lse + row, 0.0)
            tl.store(lse + n_rows + row, 0.0)
            zero_row(logits, start, V, EDGES, BLOCK, VEC)
        else:
            scale = post if SOFTCAP is not None else pre
            known = (label >= 0) & (label < V)
            raw_target = tl.load(logits + start + label, mask=known, other=0.0)  # arrives while the row streams
            top, total = row_max_and_sum(logits, start, V, pre, scale, SOFTCAP, EDGES, BLOCK, VEC, KEEP)
            target = to_unit(raw_target, pre, SOFTCAP)
            log_total = tl.log(total)
            tl.store(log_probs + row, tl.where(known, (target - top) * scale - log_total, float("nan")))
            tl.store(lse + row, top)
            tl.store(lse + n_rows + row, log_total)
            one = tl.where(known, 1.0, float("nan"))
            inverse = 1.0 / total
            write_row(
                logits, logits, start, start, V, label, one, top, inverse, pre, post, SOFTCAP, EDGES, BLOCK, VEC, DROP
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
    SAME_LAYOUT: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    DROP: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = row_pointer(row, n_inner, stride_outer, stride_inner)
    out_start = start if SAME_LAYOUT else row_pointer(row, n_inner, out_stride_outer, out_stride_inner)
    coefficient = 1.0
    if coefficients is not None:
        coefficient = tl.load(coefficients + row)
    if (label == ignore_index) | (coefficient == 0.0):
        zero_row(out, out_start, V, EDGES, BLOCK, VEC)
    else:
        coefficient = tl.where((label >= 0) & (label < V), coefficient, float("nan"))
        top = tl.load(lse + row)
        inverse = tl.exp(-tl.load(lse + tl.num_programs(0) + row))
        write_row(
            logits,
            out,
            start,
            out_start,
            V,
            label,
            coefficient,
            top,
            inverse,
            pre,
            post,
            SOFTCAP,
            EDGES,
            BLOCK,
            VEC,
            DROP,
        )


def fused_rows_(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    rows = row_launch(logits, summed=True)
    log_probs = torch.empty(rows.n_rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(2, rows.n_rows, dtype=torch.float32, device=logits.device)
    if rows.n_rows:
        row_bytes, threads = logits.shape[-1] * logits.element_size(), rows.meta["num_warps"] * common.WARP_SIZE
        launch(
            fused_rows_kernel,
            rows_at_once(rows.n_rows, row_bytes, threads, logits.device),
            logits.device,
            logits,
            labels,
            log_probs,
            lse,
            rows.n_rows,
            logits.shape[-1],
            *rows.layout,
            z.pre,
            z.post,
            z.ignore_index,
            SOFTCAP=common.soft_cap(z),
            KEEP=common.KEEP,
            DROP=common.DROP,
            **rows.meta,
        )
    return log_probs, lse


def grad_rows_(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: Tensor | None, z: LogitMap, out: Tensor
) -> None:
    rows, target = row_launch(logits), row_launch(out)
    if rows.n_rows:
        launch(
            grad_rows_kernel,
            rows.n_rows,
            logits.device,
            logits,
            out,
            labels,
            lse,
            coefficients,
            logits.shape[-1],
            *rows.layout,
            *target.layout[1:],
            z.pre,
            z.post,
            z.ignore_index,
            SOFTCAP=common.soft_cap(z),
            SAME_LAYOUT=rows.layout == target.layout,
            DROP=common.DROP,
            **(rows.meta | {"EDGES": rows.meta["EDGES"] or target.meta["EDGES"]}),
        )


def clear_rows_(rows: Tensor, coefficients: Tensor) -> None:
    n_rows, layout, meta = row_launch(rows)
    if n_rows:
        launch(clear_rows_kernel, n_rows, rows.device, rows, coefficients, rows.shape[-1], *layout, **meta)
