"""What the row kernels share: a walk along a row of any alignment in 16-byte vectors, and the map from raw to logits.

A row [V] is cut into a *body* of whole aligned 16-byte vectors and at most VEC − 1 *edge* elements on either
side of it. The body is read in tiles of [BLOCK / VEC, VEC]; its mask depends on the vector and not on the element,
so that every load and store stays 16 bytes wide for every V and every row start. Without this, a row length
that is odd makes each access 2 bytes wide.

A lane (one vector's place in the tile) keeps a running maximum and sum of its own: one rescaling exponential
per VEC elements and no exchange between threads until the row ends. Each step's loads are issued in the step
before: otherwise the assembler postpones all but one or two of a step's loads to save registers, and waits
for memory several times in each step.

The kernels use no global constants: Triton compares each with what it was, at every launch, on the host.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.problem import LogitMap

VECTOR_BYTES = 16  # the widest load and store of a thread
VECTORS = 2  # of each thread in a step along a row, in flight at once; with 4, half as many programs have registers
THREADS = 256  # of a program
ROW_BYTES = 256  # of a row that is summed up, for each thread: a row past 64 KiB gets MAX_THREADS
MAX_THREADS = 512
REGISTERS: int | None = 64  # at most, of a thread that sums a row up
LIMITS_REGISTERS = torch.version.hip is None  # AMD's compiler takes no limit
MULTIPROCESSOR_THREADS = 1024  # that run at once, of 64 registers each
L2_PERCENT = 80  # of L2, for rows that wait there for their second sweep; 0: as many as run (`rows_at_once`)
# Of L2: what is swept again is to stay, what is read or written for the last time is to go. "" is no hint.
KEEP, DROP = "evict_last", "evict_first"
WARP_SIZE = 64 if torch.version.hip else 32
# How a soft cap divides (`reciprocal`); the interpreter knows no PTX.
DIVISION = "ieee" if torch.version.hip or triton.knobs.runtime.interpret else "ptx"


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
def reciprocal(x, HOW: tl.constexpr):
    """1 / x for x >= 1. On NVIDIA a quotient costs eight instructions, for other x's sake; PTX's reciprocal one."""
    if HOW == "ptx":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def tanh(x, HOW: tl.constexpr):
    """tanh(x) to four units of the last place of fp32.

    x (1 + s P(s)) / Q(s) with s = x² is the minimax rational of relative error 1.6e-8 on |x| <= 8.7, beyond which tanh
    is 1 in fp32. Thirteen instructions and one division; exponentials, of which the softmax needs its own, are scarcer.
    """
    x = tl.clamp(x, -8.7, 8.7, propagate_nan=tl.PropagateNan.ALL)
    s = x * x
    p = ((1.3962104946041076e-08 * s + 2.1043778455155804e-05) * s + 0.003521939752974045) * s + 0.134032160201518
    q = (8.023904131956376e-07 * s + 0.0003328758632739063) * s + 0.025977229423600822
    q = (q * s + 0.4673654059946975) * s + 1.0
    return ((x * s) * p + x) * reciprocal(q, HOW)


@triton.jit
def tanh_and_slope(x, HOW: tl.constexpr):
    """tanh(x), and 1 − tanh²(x) = exp(−2|x|) (1 + |tanh x|)², which is exact where the difference cancels."""
    t = tanh(x, HOW)
    one_more = 1.0 + tl.abs(t)
    return t, tl.exp2(tl.abs(x) * (-2.0 * 1.4426950408889634)) * one_more * one_more


@triton.jit
def to_unit(raw, pre, SOFTCAP: tl.constexpr):
    """u with z = u · scale for the z of `LogitMap`: raw, or tanh(pre · raw) with a soft-cap. fp32."""
    u = raw.to(tl.float32)
    if SOFTCAP is not None:
        u = tanh(u * pre, SOFTCAP)
    return u


@triton.jit
def exp_unit(u, scale, top):
    """exp((u − top) · scale) in three instructions; tl.exp takes three more, for results too small to matter.

    The difference comes first: of large u it is exact, where that of two rounded products may be off by any amount.
    """
    return tl.exp2((u - top) * (scale * 1.4426950408889634))  # log2 e


@triton.jit
def lane_update(top, total, u, scale):
    """Fold u [lanes, VEC] into the running (max u, Σ exp(z − max z)) of each lane; z = u · scale, scale > 0."""
    new_top = tl.maximum(top, tl.max(u, axis=1))
    total = total * exp_unit(top, scale, new_top) + tl.sum(exp_unit(u, scale, new_top[:, None]), axis=1)
    return new_top, total


@triton.jit
def row_max_and_sum(
    base,
    start,
    V,
    pre,
    scale,
    SOFTCAP: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    HINT: tl.constexpr,
):
    """One read of the row: (max u, Σ exp(z − max z)), the maximum replaced by 0 if it is −inf; z = u · scale."""
    LANES: tl.constexpr = BLOCK // VEC
    lane = tl.arange(0, LANES)
    tile = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full([LANES], -3.4028234663852886e38, tl.float32)  # fp32's lowest; finite: −inf − top is never NaN
    total = tl.zeros([LANES], tl.float32)
    first, last = body_bounds(start, V, VEC)
    whole = first + (last - first) // BLOCK * BLOCK
    raw = tl.load(base + first + tile, mask=all_lanes(first < whole, LANES), eviction_policy=HINT)
    for at in range(first + BLOCK, whole + BLOCK, BLOCK):
        ahead = tl.load(base + at + tile, mask=all_lanes(at < whole, LANES), eviction_policy=HINT)
        top, total = lane_update(top, total, to_unit(raw, pre, SOFTCAP), scale)
        raw = ahead
    if whole < last:
        inside = lane_mask(lane, whole, last, VEC)
        raw = tl.load(base + whole + tile, mask=inside, other=0.0, eviction_policy=HINT)
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
    meta: dict[str, Any]  # EDGES, BLOCK, VEC, num_warps, maxnreg


def row_launch(logits: Tensor, summed: bool = False) -> RowLaunch:
    """Launch parameters for the rows of `logits` [N, V] or [B, N, V]; the last dimension must be dense.

    All kernels that sum a row up have one configuration: the order of a sum, and so its last bit, depends on it, and
    log-probs are to be the same bits with and without a gradient. Long rows get 512 threads: two or three such
    programs run at once on a multiprocessor, so that one streams while another waits at the end of its row.
    """
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, "the vocabulary dimension must be contiguous"
    n_vocab = logits.shape[-1]
    n_outer, n_inner = (1, logits.shape[0]) if logits.dim() == 2 else logits.shape[:2]
    stride_outer, stride_inner = (0, logits.stride(0)) if logits.dim() == 2 else logits.stride()[:2]
    vec = VECTOR_BYTES // logits.element_size()
    edges = (n_vocab | stride_outer | stride_inner) % vec != 0
    row_bytes, registers = (ROW_BYTES, REGISTERS if LIMITS_REGISTERS else None) if summed else (None, None)
    constants = VECTORS, row_bytes, registers, THREADS, MAX_THREADS, WARP_SIZE
    meta = _row_meta(n_vocab, logits.element_size(), edges, *constants)
    return RowLaunch(n_outer * n_inner, (n_inner, stride_outer, stride_inner), meta)


@functools.lru_cache
def _row_meta(
    n_vocab: int,
    itemsize: int,
    edges: bool,
    vectors: int,
    row_bytes: int | None,  # for each thread; None: `threads` for every row
    registers: int | None,
    threads: int,
    max_threads: int,
    warp_size: int,
) -> dict[str, Any]:
    vec = VECTOR_BYTES // itemsize
    if n_vocab < 2 * vec:
        vec, edges = 1, False
    if row_bytes is not None:
        threads = min(max_threads, max(threads, triton.next_power_of_2(n_vocab * itemsize // row_bytes)))
    block = min(threads * vectors * vec, triton.next_power_of_2(n_vocab))
    num_warps = max(1, min(threads, block // vec) // warp_size)
    meta = {"EDGES": edges, "BLOCK": block, "VEC": vec, "num_warps": num_warps}
    return meta | register_limit(registers)


def register_limit(registers: int | None) -> dict[str, int]:
    """Of a thread, as an option of a launch.

    Without one, ptxas chooses how many, and may spill a few to bring more programs onto a multiprocessor (12.9 does).
    """
    return {"maxnreg": registers} if registers and LIMITS_REGISTERS else {}


def rows_at_once(n_rows: int, row_bytes: int, threads: int, device: torch.device) -> int:
    """Programs for rows that are swept twice: as many as find their row in L2 the second time.

    A row enters L2 in its first sweep and leaves it in its second (`KEEP`, `DROP`), so half of it is there at a time,
    on average over programs that are not in step. Two programs on each of 132 multiprocessors hold 40.1 MB at
    V = 152064 in bf16, and 69.2 MB at 262208; an H100 has 50 MB of L2. Where the rows of half of the multiprocessors
    do not fit, as in the small L2 of AMD and of older cards, the second sweep reads memory anyway, and all may run.
    Where those of all fit, each multiprocessor gets the same number. This is argued, not measured; `benchmarks.tune`
    asks a GPU.
    """
    l2_bytes, multiprocessors = _l2_and_multiprocessors(device)
    held = 2 * (l2_bytes * L2_PERCENT // 100) // row_bytes
    running = multiprocessors * (MULTIPROCESSOR_THREADS // threads)
    if held >= running or 2 * held < multiprocessors:
        return n_rows
    return min(n_rows, held if held < multiprocessors else held - held % multiprocessors)


@functools.cache
def _l2_and_multiprocessors(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":  # the interpreter's
        return 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size, properties.multi_processor_count


def soft_cap(z: LogitMap) -> str | None:
    """SOFTCAP of the kernels: None, or how they divide."""
    return None if z.softcap is None else DIVISION


def launch(kernel: Any, n_programs: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors; Triton would take the current one, wherever the tensors are.

    `options`: constexprs and num_warps. Products are fused with sums, as accuracy and machine code were checked, and
    not as the default of this or the next Triton has it. `run`, as Triton's autotuner calls it: `kernel[grid]` makes a
    function of it first, and hands the arguments on once more.
    """
    options.update(grid=(n_programs,), warmup=False, enable_fp_fusion=True)
    elsewhere = device.type == "cuda" and device.index != torch.accelerator.current_device_index()
    if elsewhere:
        with torch.accelerator.device_index(device.index):
            kernel.run(*arguments, **options)
    else:
        kernel.run(*arguments, **options)
