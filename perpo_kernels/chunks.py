"""The language head as GEMMs over chunks of tokens: how many rows of logits are held at once, and sums over chunks.

Z [rows, V] is one buffer that all chunks share. Its rows start on cache lines whatever V is, so that row kernels keep
16-byte loads and stores and GEMMs an aligned leading dimension.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.problem import LogitMap, accumulation_dtype

CPU_CHUNK_BYTES = 100 << 20  # 800 rows at V = 32000 in fp32: GEMMs within a few per cent of their rate
DEVICE_CHUNK_BYTES = 1 << 30  # 3500 rows at V = 152064 in bf16: GEMMs at full rate
ROW_MULTIPLE = 128  # rows of a GEMM tile
FP32_COPY = 4096  # of the vocabulary at once, where low-precision factors have to be copied into fp32
ALIGNMENT = 64  # bytes; the row stride of Z, so that every row starts on a cache line and a 16-byte vector


class ChunkedHead(NamedTuple):
    """The language head, applied to a chunk of tokens at a time, and the map from its outputs to logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    z: LogitMap
    kernels: backends.Backend
    chunk_bytes: int  # 0: by device

    def max_rows(self) -> int:
        """Rows of logits that the memory budget allows."""
        default = CPU_CHUNK_BYTES if self.weight.device.type == "cpu" else DEVICE_CHUNK_BYTES
        return max(1, (self.chunk_bytes or default) // self._row_bytes())

    def chunk_rows(self, n_tokens: int) -> int:
        """Tokens per chunk: equal chunks within the budget; on a GPU of whole GEMM tiles, where those fit."""
        rows = self.max_rows()
        if n_tokens <= rows:
            return max(n_tokens, 1)
        n_chunks = -(-n_tokens // rows)
        even = -(-n_tokens // n_chunks)
        if self.weight.device.type == "cpu":
            return even
        tiled = -(-even // ROW_MULTIPLE) * ROW_MULTIPLE
        return tiled if tiled <= rows else even

    def _row_bytes(self) -> int:
        return -(-self.weight.shape[0] * self.weight.element_size() // ALIGNMENT) * ALIGNMENT

    def buffer(self, rows: int) -> Tensor:
        """Z [rows, V] with aligned rows; reused by every chunk."""
        stride = self._row_bytes() // self.weight.element_size()
        return self.weight.new_empty(rows, stride)[:, : self.weight.shape[0]]

    def project(self, x: Tensor, buffer: Tensor) -> Tensor:
        """Z = x Wᵀ + bias, into the head of the buffer."""
        out = buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


def bind_head(weight: Tensor, bias: Tensor | None, z: LogitMap, chunk_bytes: int, backend: str) -> ChunkedHead:
    kernels = backends.load(backends.resolve(backend, weight.device.type, weight.dtype))
    return ChunkedHead(weight, bias, z, kernels, chunk_bytes)


def kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored; None if all are kept, or if finding them would wait for a device."""
    ignored = labels == ignore_index
    return (~ignored).nonzero().squeeze(1) if labels.device.type == "cpu" and bool(ignored.any()) else None


def chunks(start: int, stop: int, rows: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `rows`."""
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


class HeadGradient:
    """dW = Σ Dᵀ (g ⊙ X) and db = Σ Dᵀ g, summed over chunks in accumulation precision."""

    def __init__(self, head: ChunkedHead, need_weight: bool, need_bias: bool) -> None:
        dtype = accumulation_dtype(head.weight.dtype)
        n_vocab, n_hidden = head.weight.shape
        self.need_weight, self.need_bias = need_weight, need_bias
        self.clear_rows_ = head.kernels.clear_rows_
        self.weight = head.weight.new_zeros((n_vocab, n_hidden) if need_weight else (0, 0), dtype=dtype)
        self.bias = head.weight.new_zeros(n_vocab if need_bias else 0, dtype=dtype)

    def add(self, derivative: Tensor, x: Tensor, g: Tensor) -> None:
        """derivative D [n, V] (cleared here), x [n, H], g [n]. Where g is 0, D and x may hold anything, NaN too."""
        self.clear_rows_(derivative, g)
        if self.need_bias:
            add_product(self.bias.unsqueeze(1), derivative.t(), g.to(x.dtype).unsqueeze(1))
        if self.need_weight:
            scaled = torch.mul(x, g.unsqueeze(1), out=torch.empty_like(x))  # in the precision of g, rounded once
            scaled.masked_fill_((g == 0).unsqueeze(1), 0.0)
            add_product(self.weight, derivative.t(), scaled)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; in fp32 also of low-precision factors, if out is: scaled later, it is rounded once and not twice."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for part, rows in zip(a.split(FP32_COPY, dim=1), b.split(FP32_COPY), strict=True):
            out.addmm_(part.to(out.dtype), rows.to(out.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b. Low-precision factors are multiplied into an fp32 sum, never rounded in between."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, part in zip(out.split(FP32_COPY), a.split(FP32_COPY), strict=True):
            rows.addmm_(part.to(out.dtype), b.to(out.dtype))
