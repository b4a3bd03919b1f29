"""The language head as GEMMs over chunks of tokens: how many rows of logits are held at once, and sums over chunks.

Z [rows, V] is one buffer that all chunks share. Its rows start on cache lines whatever V is, so that row kernels keep
16-byte loads and stores and GEMMs an aligned leading dimension. D takes its place, or where Z is wider than the
head, a buffer of its own in the head's dtype.

Factors in 16 bits are multiplied into fp32 by the GEMM itself where the device's library does that (`wide_products`).
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.problem import LogitMap, accumulation_dtype

CPU_CHUNK_BYTES = 100 << 20  # 800 rows at V = 32000 in fp32: GEMMs within a few per cent of their rate
DEVICE_CHUNK_BYTES = 1 << 30  # 3500 rows at V = 152064 in bf16: GEMMs at full rate
ROW_MULTIPLE = 128  # rows of a GEMM tile
CPU_BLOCK = 1 << 12  # of the vocabulary at once, where fp32 copies or products pass through a temporary
DEVICE_BLOCK = 1 << 13
ALIGNMENT = 64  # bytes; the row stride of Z, so that every row starts on a cache line and a 16-byte vector


def padded(n_vocab: int, dtype: torch.dtype) -> int:
    """Elements from one row of logits to the next."""
    return -(-n_vocab * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize


def max_rows(weight: Tensor, logits_dtype: torch.dtype, chunk_bytes: int, need_weight: bool = False) -> int:
    """Rows of logits that the memory budget allows; 0 bytes stand for the default of the device.

    By default, where a gradient of the weight is needed, D may take as much as the fp32 sum that it spares.
    """
    dtypes = {logits_dtype, weight.dtype}
    row_bytes = sum(padded(weight.shape[0], dtype) * dtype.itemsize for dtype in dtypes)
    default = CPU_CHUNK_BYTES if weight.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, (chunk_bytes or default) // max(row_bytes, 1))
    return rows if chunk_bytes or not need_weight else max(rows, _rows_as_large_as_the_weight(weight))


def keeps_derivative(n_tokens: int, weight: Tensor, rows: int) -> bool:
    """Whether all of D is kept for dW: it was made in one chunk and is no larger than the fp32 sum would be."""
    return n_tokens <= min(rows, _rows_as_large_as_the_weight(weight))


def _rows_as_large_as_the_weight(weight: Tensor) -> int:
    return weight.shape[1] * accumulation_dtype(weight.dtype).itemsize // weight.dtype.itemsize


class ChunkedHead(NamedTuple):
    """The language head, applied to a chunk of tokens at a time, and the map from its outputs to logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    z: LogitMap
    kernels: backends.Backend
    chunk_bytes: int  # 0: by device
    logits_dtype: torch.dtype

    def max_rows(self, need_weight: bool = False) -> int:
        return max_rows(self.weight, self.logits_dtype, self.chunk_bytes, need_weight)

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

    def buffers(self, rows: int) -> "Buffers":
        z = self._rows(rows, self.logits_dtype)
        return Buffers(z, z if self.logits_dtype == self.weight.dtype else self._rows(rows, self.weight.dtype))

    def _rows(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.weight.new_empty(rows, padded(self.weight.shape[0], dtype), dtype=dtype)

    def logits(self, x: Tensor, buffers: "Buffers") -> Tensor:
        """Z = x Wᵀ + bias, into the head of the buffer."""
        return project(x, self.weight, self.bias, buffers.z[: x.shape[0], : self.weight.shape[0]])

    def derivative(self, n_rows: int, buffers: "Buffers") -> Tensor:
        """Where D goes; the logits themselves if they have its dtype."""
        return buffers.d[:n_rows, : self.weight.shape[0]]

    def log_probs_and_derivative(self, x: Tensor, labels: Tensor, buffers: "Buffers") -> tuple[Tensor, Tensor, Tensor]:
        """log_probs [n], lse [2, n] and D [n, V]."""
        raw, d = self.logits(x, buffers), self.derivative(x.shape[0], buffers)
        if buffers.z is buffers.d:
            return *self.kernels.fused_rows_(raw, labels, self.z), raw
        log_probs, lse = self.kernels.log_prob_rows(raw, labels, self.z)
        self.kernels.grad_rows_(raw, labels, lse, None, self.z, d)
        return log_probs, lse, d


class Buffers(NamedTuple):
    """Memory of one chunk, shared by all: rows of padded length."""

    z: Tensor
    d: Tensor  # the same tensor where D has the dtype of the logits


def bind_head(
    weight: Tensor, bias: Tensor | None, z: LogitMap, chunk_bytes: int, logits_dtype: torch.dtype, backend: str
) -> ChunkedHead:
    kernels = backends.load(backends.resolve(backend, weight.device.type, weight.dtype))
    return ChunkedHead(weight, bias, z, kernels, chunk_bytes, logits_dtype)


def kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored; None if all are kept, or if finding them would wait for a device."""
    if labels.device.type != "cpu":
        return None
    kept = labels != ignore_index
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def chunks(start: int, stop: int, rows: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `rows`."""
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


# ------------------------------------------------------------------------------------------------ gradient of the head


class HeadGradient:
    """dW = Σ Dᵀ X and db = Σ Dᵀ f, summed over chunks in accumulation precision."""

    def __init__(self, head: ChunkedHead, need_weight: bool, need_bias: bool) -> None:
        dtype = accumulation_dtype(head.weight.dtype)
        n_vocab, n_hidden = head.weight.shape
        self.need_weight, self.need_bias, self.started = need_weight, need_bias, False
        self.weight = head.weight.new_empty((n_vocab, n_hidden) if need_weight else (0, 0), dtype=dtype)
        self.bias = head.weight.new_zeros(n_vocab if need_bias else 0, dtype=dtype)

    def add(self, d: Tensor, x: Tensor, f: Tensor, unit: Tensor | None) -> None:
        """The share of D [n, V] and X [n, H] in multiples of f [n] and of `unit` []. Where f is 0, D must be 0 and X
        may hold anything, NaN too."""
        if self.need_bias:
            add_product(self.bias.unsqueeze(1), d.t(), f.to(d.dtype).unsqueeze(1), unit)
        if not self.need_weight:
            return
        if not self.started and unit is None and (d.dtype == self.weight.dtype or wide_products(d)):
            multiply(d.t(), selected(x, f), self.weight)
        else:
            add_product(self.sum(), d.t(), selected(x, f), unit)
        self.started = True

    def sum(self) -> Tensor:
        """dW so far. The first product is written and not added: zeros would be made and read for nothing."""
        if not self.started:
            self.weight.zero_()
        return self.weight


def selected(x: Tensor, f: Tensor) -> Tensor:
    """f ⊙ X, of the dtype of X and rounded once; 0 where f is, whatever X holds there."""
    out = torch.mul(x, f.unsqueeze(1), out=torch.empty_like(x))
    return out.masked_fill_((f == 0).unsqueeze(1), 0.0)


def scaled_product(d: Tensor, x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale · Dᵀ X [V, H] in `dtype`, rounded once, with no more than a block of it in fp32."""
    out = x.new_empty(d.shape[1], x.shape[1], dtype=dtype)
    if scale is None:
        return torch.mm(d.t(), x, out=out)
    if dtype == accumulation_dtype(dtype):
        return torch.mm(d.t(), x, out=out).mul_(scale)
    block = fp32_block(d.device)
    wide = x.new_empty(min(block, len(out)), x.shape[1], dtype=accumulation_dtype(dtype))
    for columns, rows in zip(d.split(block, dim=1), out.split(block), strict=True):
        product = wide[: len(rows)]
        multiply(columns.t(), x, product)
        torch.mul(product, scale, out=rows)
    return out


# ---------------------------------------------------------------------- products of low-precision factors, in fp32


def fp32_block(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def wide_products(x: Tensor) -> bool:
    """Whether `x`'s device multiplies its dtype into fp32: CUDA does, ROCm and TunableOp are asked."""
    if x.device.type != "cuda":
        return False
    tunable = getattr(torch._C, "_cuda_tunableop_is_enabled", None)  # no part of a build for the CPU
    if torch.version.hip is None and not (tunable is not None and tunable()):
        return True
    return _wide_products(x.device, x.dtype, tunable is not None and tunable())


def fp32_copies(x: Tensor) -> bool:
    """Whether factors are copied into fp32 where their product can't be: exact, but on a GPU many times slower."""
    return x.device.type != "cuda"


@functools.cache
def _wide_products(device: torch.device, dtype: torch.dtype, tunable: bool) -> bool:
    """Found out by trying, once for each device and setting: what a library refuses is not told otherwise."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.empty(16, 16, device=device, dtype=torch.float32)
    try:
        torch.mm(a, a, out_dtype=out.dtype, out=out)
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x Wᵀ + bias, where `out` may be fp32 and the factors not."""
    if out.dtype == x.dtype:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if wide_products(x):
        if bias is None:
            return torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return torch.addmm(bias.to(out.dtype), x, weight.t(), out_dtype=out.dtype, out=out)
    block, wide = fp32_block(x.device), x.to(out.dtype)
    for columns, rows in zip(out.split(block, dim=1), weight.split(block), strict=True):
        torch.mm(wide, rows.to(out.dtype).t(), out=columns)
    return out if bias is None else out.add_(bias)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; in fp32 also of low-precision factors, if out is: scaled later, it is rounded once and not twice."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif wide_products(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif not fp32_copies(a):
        out.copy_(torch.mm(a, b))  # at the speed of the low-precision product, for one more rounding to its dtype
    else:
        out.zero_()
        block = fp32_block(a.device)
        for part, rows in zip(a.split(block, dim=1), b.split(block), strict=True):
            out.addmm_(part.to(out.dtype), rows.to(out.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor, unit: Tensor | None = None) -> None:
    """out += unit · a b. Low-precision factors are multiplied into an fp32 sum, never rounded in between."""
    if unit is None and out.dtype == a.dtype:
        out.addmm_(a, b)
        return
    if unit is None and wide_products(a):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return
    block = fp32_block(out.device)
    wide = out.new_empty(min(block, len(out)), out.shape[1])
    for rows, part in zip(out.split(block), a.split(block), strict=True):
        product = wide[: len(rows)]
        multiply(part, b, product)
        rows.add_(product) if unit is None else rows.addcmul_(product, unit)
