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

from perpo_kernels.backends.triton.common import row_launch, row_max_and_sum, row_pointer, to_unit
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
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(log_probs + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(lse + tl.num_programs(0) + row, 0.0)
    else:
        start = row_pointer(row, n_inner, stride_outer, stride_inner)
        scale = post if SOFTCAP else pre
        top, total = row_max_and_sum(logits, start, V, pre, scale, SOFTCAP, EDGES, BLOCK, VEC)
        known = (label >= 0) & (label < V)
        target = to_unit(tl.load(logits + start + label, mask=known, other=0.0), pre, SOFTCAP)
        log_total = tl.log(total)
        tl.store(log_probs + row, tl.where(known, (target - top) * scale - log_total, float("nan")))
        tl.store(lse + row, top)
        tl.store(lse + tl.num_programs(0) + row, log_total)


def log_prob_rows(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    launch = row_launch(logits)
    log_probs = torch.empty(launch.n_rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(2, launch.n_rows, dtype=torch.float32, device=logits.device)
    if launch.n_rows:
        log_prob_rows_kernel[(launch.n_rows,)](
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
