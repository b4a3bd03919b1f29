"""log_prob_rows: log softmax(z)[label] and log Σ exp z of each row, in one read.

    z = u · scale      m = max_v u_v      l = log Σ_v exp((u_v − m) · scale)      log_prob = (u_y − m) · scale − l
    lse = (m, l); u is the raw value, or its tanh under a soft cap, which scale then stretches

logits [N, V] or [B, N, V] (any row strides) -> fp32 [rows] twice. Bytes moved: V · itemsize for each valid row,
16 for an ignored one. Grid: one program per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.backends.triton import common
from perpo_kernels.backends.triton.common import launch, row_launch, row_max_and_sum, row_pointer, to_unit
from perpo_kernels.problem import LogitMap


@triton.jit
def log_prob_rows_kernel(
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
    DROP: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(log_probs + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(lse + tl.num_programs(0) + row, 0.0)
    else:
        start = row_pointer(row, n_inner, stride_outer, stride_inner)
        scale = post if SOFTCAP is not None else pre
        known = (label >= 0) & (label < V)
        raw_target = tl.load(logits + start + label, mask=known, other=0.0)  # arrives while the row streams
        top, total = row_max_and_sum(logits, start, V, pre, scale, SOFTCAP, EDGES, BLOCK, VEC, DROP)
        target = to_unit(raw_target, pre, SOFTCAP)
        log_total = tl.log(total)
        tl.store(log_probs + row, tl.where(known, (target - top) * scale - log_total, float("nan")))
        tl.store(lse + row, top)
        tl.store(lse + tl.num_programs(0) + row, log_total)


def log_prob_rows(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    rows = row_launch(logits, summed=True)
    log_probs = torch.empty(rows.n_rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(2, rows.n_rows, dtype=torch.float32, device=logits.device)
    if rows.n_rows:
        launch(
            log_prob_rows_kernel,
            rows.n_rows,
            logits.device,
            logits,
            labels,
            log_probs,
            lse,
            logits.shape[-1],
            *rows.layout,
            z.pre,
            z.post,
            z.ignore_index,
            SOFTCAP=common.soft_cap(z),
            DROP=common.DROP,
            **rows.meta,
        )
    return log_probs, lse
