"""The flash attention that PyTorch has inside, with its log-sum-exp, forward and backward, a part of a layout a call.

Two ways, by device: on a CPU one call a range, on CUDA one call of the variable-length kernel a part. Both take grouped
heads as they are and write into the whole row's output, merging where a part says so.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from perpo.prefix_layout import Part, Range

_CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA_FORWARD = torch.ops.aten._flash_attention_forward
_CUDA_BACKWARD = torch.ops.aten._flash_attention_backward


class FlashParts(Protocol):
    """query, out, d_query [1, heads, T, D]; key, value, d_key, d_value [1, key heads, T, D]; lse [heads, T]."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Write the part's output and log-sum-exp into those of the row, or merge them."""

    def backward(
        self,
        d_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        scale: float,
        out: Tensor,
        lse: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_value: Tensor,
    ) -> None:
        """Add the part's share of the gradients, given the merged output and log-sum-exp."""


def supports(query: Tensor) -> bool:
    """Whether there is a flash attention for this device, type and head size."""
    if query.device.type in ("cpu", "meta"):
        return True
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def of(query: Tensor) -> FlashParts:
    return _Cuda() if query.device.type == "cuda" else _Cpu()


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """out [heads, n, D], lse [heads, n] become those of attention over both key sets. Weights and sum in fp32."""
    total = torch.logaddexp(lse, new_lse)
    share = (new_lse - total).exp_().unsqueeze(-1)
    out.copy_(torch.lerp(out.to(share.dtype), new_out.to(share.dtype), share))
    lse.copy_(total)


class _Cpu:
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        for q, k in zip(part.queries, part.keys, strict=True):
            o, log_sum = _CPU_FORWARD(_of(query, q), _of(key, k), _of(value, k), 0.0, part.causal, scale=scale)
            if part.merge:
                merge(out[0, :, slice(*q)], lse[:, slice(*q)], o[0], log_sum[0])
            else:
                out[:, :, slice(*q)] = o
                lse[:, slice(*q)] = log_sum[0]

    def backward(
        self,
        d_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        scale: float,
        out: Tensor,
        lse: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_value: Tensor,
    ) -> None:
        for q, k in zip(part.queries, part.keys, strict=True):
            dq, dk, dv = _CPU_BACKWARD(
                _of(d_out, q),
                _of(query, q),
                _of(key, k),
                _of(value, k),
                _of(out, q),
                lse[None, :, slice(*q)],
                0.0,
                part.causal,
                scale=scale,
            )
            _of(d_query, q).add_(dq)
            _of(d_key, k).add_(dk)
            _of(d_value, k).add_(dv)


class _Cuda:
    """The variable-length kernel wants [tokens, heads, D] and head sizes that are multiples of 8."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        queries, keys = part.all_queries, part.all_keys
        o, log_sum, *_ = _CUDA_FORWARD(
            _tokens_first(query, queries),
            _tokens_first(key, keys),
            _tokens_first(value, keys),
            part.cu_queries,
            part.cu_keys,
            part.max_queries,
            part.max_keys,
            0.0,
            part.causal,
            False,
            scale=scale,
        )
        o = o[..., : query.shape[-1]].transpose(0, 1)  # [heads, n, D]
        if part.merge:
            merge(out[0, :, slice(*queries)], lse[:, slice(*queries)], o, log_sum)
        else:
            out[0, :, slice(*queries)] = o
            lse[:, slice(*queries)] = log_sum

    def backward(
        self,
        d_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        part: Part,
        scale: float,
        out: Tensor,
        lse: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_value: Tensor,
    ) -> None:
        queries, keys = part.all_queries, part.all_keys
        dq, dk, dv = _CUDA_BACKWARD(
            _tokens_first(d_out, queries),
            _tokens_first(query, queries),
            _tokens_first(key, keys),
            _tokens_first(value, keys),
            _tokens_first(out, queries),
            lse[:, slice(*queries)].contiguous(),
            part.cu_queries,
            part.cu_keys,
            part.max_queries,
            part.max_keys,
            0.0,
            part.causal,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # state of random numbers: there is no dropout
            torch.empty(0, device=query.device),
            scale=scale,
        )
        for total, share, where in ((d_query, dq, queries), (d_key, dk, keys), (d_value, dv, keys)):
            total[0, :, slice(*where)] += share[..., : total.shape[-1]].transpose(0, 1)


def _of(x: Tensor, r: Range) -> Tensor:  # [1, heads, n, D]
    return x[:, :, slice(*r)]


def _tokens_first(x: Tensor, r: Range) -> Tensor:  # [n, heads, D], D padded to a multiple of 8
    x = x[0, :, slice(*r)].transpose(0, 1)
    short = -x.shape[-1] % 8
    return torch.nn.functional.pad(x, (0, short)) if short else x
