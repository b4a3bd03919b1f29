"""The flash attention that PyTorch has inside, with its log-sum-exp, forward and backward, a part of a layout a call.

Two ways, by device: on a CPU one call a range, on CUDA one call of the variable-length kernel a part. Both take grouped
heads as they are and write into the whole row's output, merging where a part says so.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from perpo.prefix.layout import Part, Range

_CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA_FORWARD = torch.ops.aten._flash_attention_forward
_CUDA_BACKWARD = torch.ops.aten._flash_attention_backward


class PackedRow(NamedTuple):
    """A packed row of T tokens."""

    query: Tensor  # [1, heads, T, D]
    key: Tensor  # [1, key heads, T, D]
    value: Tensor  # [1, key heads, T, D]
    out: Tensor  # [1, heads, T, D]
    lse: Tensor  # [heads, T]


class Gradients(NamedTuple):
    """Of a row's tensors, in their shapes."""

    out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class FlashKernels(Protocol):
    def forward(self, row: PackedRow, part: Part, scale: float) -> None:
        """Write the part's output and log-sum-exp into those of the row, or merge them."""

    def backward(self, row: PackedRow, d: Gradients, part: Part, scale: float) -> None:
        """Add the part's share to the gradients of query, key and value, given the merged output and log-sum-exp."""


def supports(query: Tensor) -> bool:
    """Whether there is a flash attention for this device, type and head size."""
    if query.device.type != "cuda":
        return query.device.type in ("cpu", "meta")
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and (query.shape[-1] <= 192 or 224 < query.shape[-1] <= 256)  # 224: no backward pass on small GPUs
        and _has_kernel(query.device)
    )


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device) -> bool:
    return (
        torch.version.hip is None  # whose kernel lays its log-sum-exp out in another way
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def kernels_for(query: Tensor) -> FlashKernels:
    return _Cuda() if query.device.type == "cuda" else _Cpu()


class _Cpu:
    def forward(self, row: PackedRow, part: Part, scale: float) -> None:
        for q, k in zip(part.queries, part.keys, strict=True):
            out, lse = _CPU_FORWARD(
                _of(row.query, q), _of(row.key, k), _of(row.value, k), 0.0, part.causal, scale=scale
            )
            _write(row, part, q, out[0], lse[0])

    def backward(self, row: PackedRow, d: Gradients, part: Part, scale: float) -> None:
        for q, k in zip(part.queries, part.keys, strict=True):
            shares = _CPU_BACKWARD(
                _of(d.out, q),
                _of(row.query, q),
                _of(row.key, k),
                _of(row.value, k),
                _of(row.out, q),
                row.lse[None, :, slice(*q)],
                0.0,
                part.causal,
                scale=scale,
            )
            for total, share, where in zip((d.query, d.key, d.value), shares, (q, k, k), strict=True):
                _of(total, where).add_(share)


class _Cuda:
    """The variable-length kernel wants [tokens, heads, D] and head sizes that are multiples of 8.

    Its greatest lengths are upper bounds. They are at least 2: given 1, the kernel treats grouped heads as queries.
    """

    def forward(self, row: PackedRow, part: Part, scale: float) -> None:
        queries, keys = part.all_queries, part.all_keys
        out, lse, *_ = _CUDA_FORWARD(
            _tokens_first(row.query, queries),
            _tokens_first(row.key, keys),
            _tokens_first(row.value, keys),
            part.cu_queries,
            part.cu_keys,
            max(part.max_queries, 2),
            part.max_keys,
            0.0,
            part.causal,
            False,
            scale=scale,
        )
        _write(row, part, queries, out[..., : row.query.shape[-1]].transpose(0, 1), lse)

    def backward(self, row: PackedRow, d: Gradients, part: Part, scale: float) -> None:
        queries, keys = part.all_queries, part.all_keys
        shares = _CUDA_BACKWARD(
            _tokens_first(d.out, queries),
            _tokens_first(row.query, queries),
            _tokens_first(row.key, keys),
            _tokens_first(row.value, keys),
            _tokens_first(row.out, queries),
            row.lse[:, slice(*queries)].contiguous(),
            part.cu_queries,
            part.cu_keys,
            max(part.max_queries, 2),
            part.max_keys,
            0.0,
            part.causal,
            torch.zeros(2, dtype=torch.uint64, device=d.out.device),  # of random numbers: there is no dropout
            torch.empty(0, device=d.out.device),
            scale=scale,
        )
        for total, share, where in zip((d.query, d.key, d.value), shares, (queries, keys, keys), strict=True):
            _of(total, where)[0].add_(share[..., : total.shape[-1]].transpose(0, 1))


def _write(row: PackedRow, part: Part, queries: Range, out: Tensor, lse: Tensor) -> None:
    """A part's out [heads, n, D] and lse [heads, n] become, or are merged into, those of the row; sums in fp32."""
    there, lse_there = _of(row.out, queries)[0], row.lse[:, slice(*queries)]
    if not part.merge:
        there.copy_(out)
        lse_there.copy_(lse)
        return
    total = torch.logaddexp(lse_there, lse)
    share = (lse - total).exp_().unsqueeze(-1)
    there.copy_(torch.lerp(there.to(share.dtype), out.to(share.dtype), share))
    lse_there.copy_(total)


def _of(x: Tensor, r: Range) -> Tensor:  # [1, heads, n, D]
    return x[:, :, slice(*r)]


def _tokens_first(x: Tensor, r: Range) -> Tensor:  # [n, heads, D], D padded to a multiple of 8
    x = x[0, :, slice(*r)].transpose(0, 1)
    short = -x.shape[-1] % 8
    return torch.nn.functional.pad(x, (0, short)) if short else x
