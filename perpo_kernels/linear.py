"""From hidden states to log-probs and list losses without holding the logits: chunking, GEMMs and their autograd.

∂log_prob_t/∂logits_t = onehot(y_t) − softmax_t does not depend on the loss. So the forward pass takes T tokens a
chunk at a time:

    Z = X_c Wᵀ (GEMM)      log_prob, and Z overwritten by D = onehot − softmax (row kernel)      U_c = D W (GEMM)

and keeps U [T, H]. The backward pass is a row scale, dX = g ⊙ U, for any loss above. A frozen head is done with that:
two GEMMs for forward and backward. A trainable head needs dW = Dᵀ (g ⊙ X):

- under a list loss, g is known once a whole list has been seen, so chunks of whole lists add their share while D is
  still in memory: three GEMMs. A list that does not fit the budget is swept twice, four GEMMs.
- under an unknown loss, D is made again in the backward pass: four GEMMs.

dW is summed in fp32. Under no_grad there is one GEMM and D is never formed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.backends import ListProblem, LogitMap
from perpo_kernels.layout import Segment, list_segments
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import (
    accumulation_dtype,
    check_cumulative,
    check_labels,
    first_derivative_only,
    new_list_result,
    no_autocast,
    run_list_loss,
)

CHUNK_BYTES = {"cpu": 64 << 20}  # a third of the logits of 1600 tokens at V = 32000: GEMMs lose 4 % to one chunk
CHUNK_BYTES_ELSEWHERE = 1 << 30  # 3500 rows at V = 152064 in bf16: GEMMs at full rate
ROW_MULTIPLE = 128  # rows of a GEMM tile
ALIGNMENT = 64  # bytes; the row stride of Z, so that every row starts on a cache line and a 16-byte vector


class Head(NamedTuple):
    """The language head and what maps its outputs to logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    z: LogitMap
    kernels: backends.Backend
    chunk_bytes: int  # 0: by device

    def max_rows(self) -> int:
        """Rows of logits that the memory budget allows."""
        device = self.weight.device.type
        return max(1, (self.chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE)) // self._row_bytes())

    def chunk_rows(self, n_tokens: int) -> int:
        """Tokens a chunk: equal chunks within the budget, whole GEMM tiles where that many fit."""
        rows = self.max_rows()
        if n_tokens <= rows:
            return max(n_tokens, 1)
        n_chunks = -(-n_tokens // rows)
        even = -(-n_tokens // n_chunks)
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


def _head(
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
) -> Head:
    kernels = backends.load(backends.resolve(backend, weight.device.type, weight.dtype))
    return Head(weight, bias, LogitMap(temperature, softcap, logit_scale, ignore_index), kernels, chunk_bytes)


def _kept_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Rows that are not ignored, if some are and leaving them out of the GEMMs costs no synchronisation; else None."""
    ignored = labels == ignore_index
    return (~ignored).nonzero().squeeze(1) if labels.device.type == "cpu" and bool(ignored.any()) else None


def _chunks(n_tokens: int, rows: int) -> Iterator[slice]:
    for start in range(0, n_tokens, rows):
        yield slice(start, min(start + rows, n_tokens))


class HeadGradient:
    """dW = Σ Dᵀ (g ⊙ X) and db = Σ Dᵀ g, summed over chunks in accumulation precision."""

    def __init__(self, head: Head, need_weight: bool, need_bias: bool) -> None:
        dtype = accumulation_dtype(head.weight.dtype)
        n_vocab, n_hidden = head.weight.shape
        self.need_weight, self.need_bias = need_weight, need_bias
        self.weight = head.weight.new_zeros((n_vocab, n_hidden) if need_weight else (0, 0), dtype=dtype)
        self.bias = head.weight.new_zeros(n_vocab if need_bias else 0, dtype=dtype)

    def add(self, derivative: Tensor, x: Tensor, g: Tensor) -> None:
        """derivative D [n, V], x [n, H], g [n]."""
        if self.need_bias:
            _add_product(self.bias.unsqueeze(1), derivative.t(), g.to(x.dtype).unsqueeze(1))
        if self.need_weight:
            _add_product(self.weight, derivative.t(), _scaled_rows(x, g))


def _scaled_rows(x: Tensor, g: Tensor) -> Tensor:
    """g ⊙ x in the dtype of x: multiplied in the precision of g, rounded once, without a copy in between."""
    return torch.mul(x, g.unsqueeze(1), out=torch.empty_like(x))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b. Low-precision factors are multiplied into an fp32 sum, never rounded in between."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, part in zip(out.split(4096), a.split(4096), strict=True):  # bounds the fp32 copies
            rows.addmm_(part.to(out.dtype), b.to(out.dtype))


# ------------------------------------------------------------------------------------------------ log-probs of tokens


@torch.library.custom_op("perpo_kernels::linear_log_probs", mutates_args=())
@no_autocast
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    keep_derivative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], labels [T] -> log_probs [T], lse [T], U = ∂log_prob/∂hidden [T, H] (or [0, H])."""
    check_labels(labels, weight.shape[0], ignore_index)
    kept = _kept_rows(labels, ignore_index)
    if kept is not None:
        options = (bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend, keep_derivative)
        results = linear_log_probs(hidden[kept], weight, labels[kept], *options)
        n_derivatives = hidden.shape[0] if keep_derivative else 0
        return tuple(
            x.new_zeros(n, *x.shape[1:]).index_copy_(0, kept, x) if n else x
            for x, n in zip(results, (len(labels), len(labels), n_derivatives), strict=True)
        )
    head = _head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    lse = torch.empty_like(log_probs)
    derivative = torch.empty_like(hidden) if keep_derivative else hidden.new_empty(0, n_hidden)
    rows = head.chunk_rows(n_tokens)
    buffer = head.buffer(rows)
    step = head.kernels.fused_rows_ if keep_derivative else head.kernels.log_prob_rows
    for c in _chunks(n_tokens, rows):
        z = head.project(hidden[c], buffer)
        log_probs[c], lse[c] = step(z, labels[c], head.z)
        if keep_derivative:
            torch.mm(z, weight, out=derivative[c])
    return log_probs, lse, derivative


@linear_log_probs.register_fake
def _(hidden: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep_derivative = options[-1]
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    return log_probs, torch.empty_like(log_probs), hidden.new_empty(n_tokens if keep_derivative else 0, n_hidden)


@torch.library.custom_op("perpo_kernels::linear_log_probs_head_backward", mutates_args=())
@no_autocast
def linear_log_probs_head_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """-> dW [V, H] and db [V], or empty; the logits are made again, a chunk at a time."""
    kept = _kept_rows(labels, ignore_index)
    if kept is not None:
        grad, hidden, labels, lse = (x[kept] for x in (grad, hidden, labels, lse))
    head = _head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    total = HeadGradient(head, need_weight, need_bias)
    rows = head.chunk_rows(hidden.shape[0])
    buffer = head.buffer(rows)
    for c in _chunks(hidden.shape[0], rows):
        z = head.project(hidden[c], buffer)
        head.kernels.grad_rows_(z, labels[c], lse[c], None, head.z, z)
        total.add(z, hidden[c], grad[c])
    return total.weight.to(weight.dtype, copy=False), total.bias.to(weight.dtype)


@linear_log_probs_head_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = options[-2:]
    return weight.new_empty(weight.shape if need_weight else (0, 0)), weight.new_empty(
        weight.shape[0] if need_bias else 0
    )


@torch.library.custom_op("perpo_kernels::scale_rows", mutates_args=())
@no_autocast
def scale_rows(x: Tensor, g: Tensor) -> Tensor:
    """dX = g ⊙ U: x [T, H], g [T] in accumulation precision -> [T, H] in the dtype of x."""
    return _scaled_rows(x, g)


@scale_rows.register_fake
def _(x: Tensor, g: Tensor) -> Tensor:
    return torch.empty_like(x)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, bias, *ctx.options, _ = inputs
    _, lse, derivative = output
    need_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    # A frozen head needs U alone: hidden states and lse are let go.
    saved = (hidden, weight, labels, lse, bias) if need_head else (None,) * 5
    ctx.save_for_backward(derivative, *saved)
    ctx.mark_non_differentiable(lse, derivative)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("linear_token_log_probs")
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 11
    derivative, hidden, weight, labels, lse, bias = ctx.saved_tensors
    d_hidden = scale_rows(derivative, grad) if need_hidden else None
    d_weight = d_bias = None
    if need_weight or need_bias:
        d_weight, d_bias = linear_log_probs_head_backward(
            grad, hidden, weight, labels, lse, bias, *ctx.options, need_weight, need_bias
        )
    return (
        d_hidden,
        d_weight if need_weight else None,
        None,
        d_bias if need_bias else None,
        *(None,) * 7,
    )


linear_log_probs.register_autograd(_linear_backward, setup_context=_linear_setup)


# ------------------------------------------------------------------------------- the list loss over a trainable head


@torch.library.custom_op("perpo_kernels::linear_list_loss", mutates_args=())
@no_autocast
def linear_list_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    rewards: Tensor,
    cu_seqlens: Tensor,
    cu_lists: Tensor,
    ref_log_probs: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    objective: Sequence[float],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and every gradient in one pass over chunks of whole lists.

    -> Σ losses [], coefficients [T], sequence_log_probs [S], stats [4, G], U [T, H] or [0, H], dW [V, H] or [0, 0] in
    accumulation precision, db [V] or [0] likewise. dX = coefficients ⊙ U.
    """
    check_labels(labels, weight.shape[0], ignore_index)
    check_cumulative("cu_lists", cu_lists, rewards.numel(), "candidates")
    check_cumulative("cu_seqlens", cu_seqlens, hidden.shape[0], "tokens")
    head = _head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    n_tokens, n_hidden = hidden.shape
    device = hidden.device
    log_probs = hidden.new_zeros(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    problem = ListProblem(
        log_probs,
        rewards.contiguous(),
        cu_lists.to(device).contiguous(),
        cu_seqlens.to(device).contiguous(),
        labels,
        None if ref_log_probs is None else ref_log_probs.contiguous(),
        None,
        Objective(*objective),
        ignore_index,
    )
    result = new_list_result(problem)
    derivative = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0, n_hidden)
    gradient = HeadGradient(head, need_weight, need_bias)
    rows = head.max_rows()
    buffer = head.buffer(min(rows, n_tokens))
    # |c| is at most β and about β / k: near 1 once divided by this, so that g ⊙ X keeps fp16's range.
    unit = problem.objective.beta / max(1, rewards.numel() // max(1, cu_lists.numel() - 1))

    def close_lists(segment: Segment) -> None:
        lists = slice(segment.first_list, segment.last_list)
        part = problem._replace(cu_lists=problem.cu_lists[segment.first_list : segment.last_list + 1])
        run_list_loss(part, backend, result._replace(losses=result.losses[lists], stats=result.stats[:, lists]))

    def add_chunk(z: Tensor, c: slice) -> None:
        if need_hidden:
            torch.mm(z, weight, out=derivative[c])
        gradient.add(z, hidden[c], result.coefficients[c] / unit)

    for segment in _segments(cu_seqlens, cu_lists, n_tokens, rows):
        tokens = slice(segment.first_token, segment.last_token)
        if segment.last_token - segment.first_token <= rows:
            z = head.project(hidden[tokens], buffer)
            log_probs[tokens], _ = head.kernels.fused_rows_(z, labels[tokens], head.z)
            close_lists(segment)
            add_chunk(z, tokens)
            continue
        lse = torch.empty_like(log_probs)
        chunks = [
            slice(segment.first_token + c.start, segment.first_token + c.stop)
            for c in _chunks(segment.last_token - segment.first_token, rows)
        ]
        for c in chunks:
            log_probs[c], lse[c] = head.kernels.log_prob_rows(head.project(hidden[c], buffer), labels[c], head.z)
        close_lists(segment)
        for c in chunks:
            z = head.project(hidden[c], buffer)
            head.kernels.grad_rows_(z, labels[c], lse[c], None, head.z, z)
            add_chunk(z, c)
    return (
        result.losses.sum(),
        result.coefficients,
        result.sequence_log_probs,
        result.stats,
        derivative,
        gradient.weight.mul_(unit),
        gradient.bias.mul_(unit),
    )


def _segments(cu_seqlens: Tensor, cu_lists: Tensor, n_tokens: int, rows: int) -> list[Segment]:
    """Runs of whole lists of at most `rows` tokens; a single run if all fit or only the device knows the bounds."""
    n_lists = cu_lists.numel() - 1
    on_host = cu_seqlens.device.type == "cpu" and cu_lists.device.type == "cpu"
    if n_tokens <= rows or not on_host:
        return [Segment(0, n_lists, 0, n_tokens)] if n_tokens else []
    return list_segments(cu_seqlens, cu_lists, rows)


@linear_list_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    rewards: Tensor,
    cu_seqlens: Tensor,
    cu_lists: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = options[-3:]

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))

    n_tokens, n_hidden = hidden.shape
    return (
        new(),
        new(n_tokens),
        new(rewards.shape[0]),
        new(4, cu_lists.shape[0] - 1),
        hidden.new_empty(n_tokens if need_hidden else 0, n_hidden),
        new(*(weight.shape if need_weight else (0, 0))),
        new(weight.shape[0] if need_bias else 0),
    )


def _linear_list_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, coefficients, _, _, derivative, d_weight, d_bias = output
    ctx.save_for_backward(coefficients, derivative, d_weight, d_bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _linear_list_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("linear_perpo_loss")
    if grad is None:
        return (None,) * 18
    coefficients, derivative, d_weight, d_bias = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    return (
        scale_rows(derivative, coefficients * grad) if need_hidden else None,
        (d_weight * grad).to(ctx.weight_dtype) if need_weight else None,
        None,
        (d_bias * grad).to(ctx.weight_dtype) if need_bias else None,
        *(None,) * 14,
    )


linear_list_loss.register_autograd(_linear_list_backward, setup_context=_linear_list_setup)
