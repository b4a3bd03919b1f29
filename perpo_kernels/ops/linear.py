"""From hidden states to log-probs and list losses without holding the logits: chunking, GEMMs and their autograd.

∂log_prob_t/∂logits_t = onehot(y_t) − softmax(z_t) does not depend on the loss. So the forward pass takes T tokens
chunk by chunk:

    Z = X_c Wᵀ (GEMM)      log_prob, and Z overwritten by D = onehot − softmax (row kernel)      U_c = D W (GEMM)

and keeps U [T, H], in fp32. The backward pass is a row scale, dX = g ⊙ U, for any loss above. A frozen head needs
no more: two GEMMs for forward and backward. A trainable head needs dW = Dᵀ (g ⊙ X):

- under a list loss, g is known as soon as all log-probs of a list are, so chunks of whole lists add their share while
  D is still in memory: three GEMMs. A list that does not fit the budget is computed twice: four GEMMs.
- under an unknown loss, D is recomputed in the backward pass: four GEMMs.

In 16 bits, where each rounding shows, a trainable head's D is made when g is known, with g in it: Dᵀ (g ⊙ X) would
round twice. It costs one more read of Z. In fp16 it holds g in multiples of a unit, so that neither overflows nor
underflows, whatever the loss scale.

What is kept for dW is D itself if all tokens were one chunk and it is no larger than dW in fp32, else the sum over
chunks, in fp32. Under no_grad there is one GEMM and D is never formed. Logits may be wider than the head: then Z is in
fp32, and D, beside it, in the head's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpo_kernels import checks
from perpo_kernels.chunks import (
    ChunkedHead,
    HeadGradient,
    bind_head,
    chunks,
    keeps_derivative,
    kept_rows,
    max_rows,
    multiply,
    padded,
    scaled_product,
    selected,
)
from perpo_kernels.layout import Segment, list_segments
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import first_derivative_only, holds_outputs_alone, is_observed, no_gradient, operator
from perpo_kernels.ops.lists import new_list_result, on_device
from perpo_kernels.problem import ListProblem, LogitMap, accumulation_dtype, unpack_numbers

N_MAP = len(LogitMap().numbers())
FP16_RANGE = 2.0**14  # of a D that holds g, a quarter of the largest number

# ------------------------------------------------------------------------------------------------ log-probs of tokens


@operator("linear_log_probs")
def linear_log_probs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T]
    numbers: Sequence[float],  # of the map, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    keep_derivative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log_probs [T], lse [2, T], U = ∂log_prob/∂hidden [T, H] (or [0, H])."""
    checks.label_values(labels, weight.shape[0], ignore_index)
    kept = kept_rows(labels, ignore_index)
    if kept is not None:
        log_probs, lse, derivative = linear_log_probs(
            hidden[kept],
            weight,
            bias,
            labels[kept],
            numbers,
            traced,
            ignore_index,
            chunk_bytes,
            logits_dtype,
            backend,
            keep_derivative,
        )
        n = len(labels)
        return (
            log_probs.new_zeros(n).index_copy_(0, kept, log_probs),
            lse.new_zeros(2, n).index_copy_(1, kept, lse),
            lse.new_zeros(n, hidden.shape[1]).index_copy_(0, kept, derivative) if keep_derivative else derivative,
        )
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    head = bind_head(weight, bias, z, chunk_bytes, logits_dtype, backend)
    log_probs, lse, derivative = new_log_probs(hidden, keep_derivative)
    rows = head.chunk_rows(hidden.shape[0])
    buffers = head.buffers(rows)
    for c in chunks(0, hidden.shape[0], rows):
        if keep_derivative:
            some, some_lse, d = head.log_probs_and_derivative(hidden[c], labels[c], buffers)
            multiply(d, weight, derivative[c])
        else:
            some, some_lse = head.kernels.log_prob_rows(head.logits(hidden[c], buffers), labels[c], z)
        if rows >= hidden.shape[0]:
            return some, some_lse, derivative
        log_probs[c], lse[:, c] = some, some_lse
    return log_probs, lse, derivative


def new_log_probs(hidden: Tensor, keep_derivative: bool) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    return (
        log_probs,
        log_probs.new_empty(2, n_tokens),
        log_probs.new_empty(n_tokens if keep_derivative else 0, n_hidden),
    )


@linear_log_probs.register_fake
def _(hidden: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_log_probs(hidden, keep_derivative=settings[-1])


@operator("linear_log_probs_head_backward")
def linear_log_probs_head_backward(
    grad: Tensor,  # [T]
    lse: Tensor,  # [2, T]
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T]
    numbers: Sequence[float],
    traced: Tensor | None,
    ignore_index: int,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """-> dW [V, H] and db [V], or empty, as `need` says; the logits are recomputed chunk by chunk."""
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    return head_gradient(
        bind_head(weight, bias, z, chunk_bytes, logits_dtype, backend), grad, lse, hidden, labels, need
    )


@linear_log_probs_head_backward.register_fake
def _(grad: Any, lse: Any, hidden: Any, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return new_head_gradient(weight, settings[-1], weight.dtype)


def head_gradient(
    head: ChunkedHead,
    grad: Tensor,  # [T]
    lse: Tensor,  # [n, T]: what the head's grad_rows_ takes
    hidden: Tensor,  # [T, H]
    labels: Tensor,  # [T]
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    weight, z = head.weight, head.z
    kept = kept_rows(labels, z.ignore_index)
    if kept is not None:
        grad, hidden, labels, lse = grad[kept], hidden[kept], labels[kept], lse[:, kept]
    n_tokens, need_weight = hidden.shape[0], need[0]
    rows = head.chunk_rows(n_tokens)
    one_chunk = need_weight and keeps_derivative(n_tokens, weight, rows)
    total = HeadGradient(head, need_weight and not one_chunk, need[1])
    g, unit = in_units(grad, z, weight.dtype)
    present = present_in(g)
    buffers = head.buffers(rows)
    d_weight = torch.zeros_like(weight) if one_chunk and n_tokens == 0 else None
    for c in chunks(0, n_tokens, rows):
        raw, d = head.logits(hidden[c], buffers), head.derivative(len(hidden[c]), buffers)
        head.kernels.grad_rows_(raw, labels[c], lse[:, c].contiguous(), g[c], z, d)
        total.add(d, hidden[c], present[c], unit)
        if one_chunk:
            d_weight = scaled_product(d, selected(hidden, present), unit, weight.dtype)
    d_weight = total.sum() if d_weight is None else d_weight
    return d_weight.to(weight.dtype, copy=False), total.bias.to(weight.dtype)


def in_units(g: Tensor, z: LogitMap, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """g in multiples of a unit [], and the unit: g · D / unit then fills the range of fp16. Others need none: None."""
    if dtype != torch.float16:
        return g, None
    largest = g.abs().amax() if len(g) else g.new_zeros(())
    unit = (largest * (z.pre * z.post / FP16_RANGE)).clamp_(min=torch.finfo(g.dtype).tiny)
    return g / unit, unit


def present_in(g: Tensor) -> Tensor:
    """1 where g is not 0, else 0."""
    return (g != 0).to(g.dtype)


def new_head_gradient(weight: Tensor, need: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = need
    return (
        weight.new_empty(weight.shape if need_weight else (0, 0), dtype=dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype),
    )


@operator("scaled")
def scaled(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g · x in `dtype`, rounded once and without a copy in the higher precision. x [T, H] with g [T]; or g is a scalar.

    Rows with g = 0 are 0 whatever x holds there: what takes part in nothing is selected away, not multiplied by 0.
    """
    return _write_scaled(x, g, torch.empty_like(x, dtype=dtype))


def _write_scaled(x: Tensor, g: Tensor, out: Tensor) -> Tensor:
    if g.dim() == 0:
        return torch.mul(x, g, out=out)
    return torch.mul(x, g.unsqueeze(1), out=out).masked_fill_((g == 0).unsqueeze(1), 0.0)


def scaled_saved(ctx: Any, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of what a forward pass saved: in place if nobody else holds it and it is released after this pass."""
    if x.dtype == dtype and holds_outputs_alone(ctx) and not is_observed(x, g):
        return _write_scaled(x, g, x).detach()
    return scaled(x, g, dtype)


@scaled.register_fake
def _(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _log_probs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, ctx.numbers, traced, *ctx.settings, _ = inputs
    _, lse, derivative = output
    need_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.hidden_dtype = hidden.dtype
    # A frozen head needs U alone: hidden states and lse are not kept.
    ctx.save_for_backward(derivative, labels, traced, *((lse, hidden, weight, bias) if need_head else (None,) * 4))
    ctx.mark_non_differentiable(lse, derivative)
    ctx.set_materialize_grads(False)


def _log_probs_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("linear_token_log_probs")
    need_hidden, *need = ctx.needs_input_grad[:3]
    d_hidden = d_weight = d_bias = None
    if grad is not None:
        derivative, labels, traced, *saved = ctx.saved_tensors
        ignore_index = ctx.settings[0]
        grad = grad.masked_fill(labels == ignore_index, 0.0)
        if need_hidden:
            d_hidden = scaled_saved(ctx, derivative, grad, ctx.hidden_dtype)
        if any(need):
            gradients = linear_log_probs_head_backward(grad, *saved, labels, ctx.numbers, traced, *ctx.settings, need)
            d_weight, d_bias = (x if needed else None for x, needed in zip(gradients, need, strict=True))
    return d_hidden, d_weight, d_bias, *(None,) * 8


linear_log_probs.register_autograd(_log_probs_backward, setup_context=_log_probs_setup)


# ------------------------------------------------------------------------------- the list loss over a trainable head


@operator("linear_list_loss")
def linear_list_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    data: Sequence[Tensor | None],  # of ListProblem.pack
    numbers: Sequence[float],  # of the map, then of the objective, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and every gradient in one pass over chunks of whole lists.

    `need`: whether gradients of hidden, weight and bias are needed. -> Σ losses [], factors f [T], candidates [3, S],
    active [G], U [T, H] or [0, H], D [T, V padded] or dW [V, H] or [0, 0], db [V] or [0], the unit []. dX = f ⊙ U;
    dW = unit · Dᵀ ((f / unit) ⊙ X) where D is kept (`keeps_derivative`), else it is there, in accumulation precision.
    """
    values = unpack_numbers(numbers, traced)
    z = LogitMap.from_numbers(values[:N_MAP], ignore_index)
    problem = ListProblem.unpack(data, ignore_index, Objective.from_numbers(values[N_MAP:]))
    cu_seqlens, cu_lists, labels = problem.cu_seqlens, problem.cu_lists, problem.labels
    assert cu_seqlens is not None
    assert labels is not None
    checks.label_values(labels, weight.shape[0], z.ignore_index)
    checks.list_values(problem, hidden.shape[0])
    problem = on_device(problem, hidden.device)
    head = bind_head(weight, bias, z, chunk_bytes, logits_dtype, backend)
    need_hidden, need_weight, need_bias = need
    n_tokens, rows = hidden.shape[0], head.max_rows(need_weight)
    one_chunk = need_weight and keeps_derivative(n_tokens, weight, rows)
    log_probs, lse, derivative = new_log_probs(hidden, need_hidden)
    result = new_list_result(log_probs, problem)
    factors = result.coefficients
    gradient = HeadGradient(head, need_weight and not one_chunk, need_bias)
    buffers = head.buffers(min(rows, n_tokens))
    one = log_probs.new_ones(())
    fused = weight.dtype == log_probs.dtype

    def close_lists(segment: Segment) -> None:
        lists = slice(segment.first_list, segment.last_list)
        part = problem._replace(
            cu_lists=problem.cu_lists[segment.first_list : segment.last_list + 1],
            pair_weights=None if problem.pair_weights is None else problem.pair_weights[lists],
            list_weights=None if problem.list_weights is None else problem.list_weights[lists],
        )
        of_lists = result._replace(losses=result.losses[lists], active=result.active[lists])
        head.kernels.list_loss(log_probs, part, of_lists)
        tokens = slice(segment.first_token, segment.last_token)
        factors[tokens].masked_fill_(labels[tokens] == ignore_index, 0.0)

    def add_chunk(d: Tensor, c: slice, present: Tensor, unit: Tensor | None) -> None:
        if need_hidden:
            multiply(d, weight, derivative[c])
        gradient.add(d, hidden[c], present, unit)

    unit: Tensor | None = None
    for segment in _segments(cu_seqlens, cu_lists, n_tokens, rows):
        tokens = slice(segment.first_token, segment.last_token)
        n = segment.last_token - segment.first_token
        if n == 0:
            close_lists(segment)
            continue
        if fused and n <= rows:
            log_probs[tokens], _, d = head.log_probs_and_derivative(hidden[tokens], labels[tokens], buffers)
            close_lists(segment)
            head.kernels.clear_rows_(d, factors[tokens])
            add_chunk(d, tokens, factors[tokens], None)
            continue
        pieces = list(chunks(segment.first_token, segment.last_token, rows))
        for c in pieces:
            raw = head.logits(hidden[c], buffers)
            log_probs[c], lse[:, c] = head.kernels.log_prob_rows(raw, labels[c], z)
        close_lists(segment)
        g, unit = in_units(factors[tokens], z, weight.dtype)
        present = present_in(g)
        for c in pieces:
            here = slice(c.start - tokens.start, c.stop - tokens.start)
            if len(pieces) > 1:
                raw = head.logits(hidden[c], buffers)
            d = head.derivative(c.stop - c.start, buffers)
            head.kernels.grad_rows_(raw, labels[c], lse[:, c].contiguous(), g[here], z, d)
            add_chunk(d, c, present[here], unit)
        factors[tokens] = present if unit is None else present * unit
    kept = buffers.d if one_chunk else gradient.sum()
    unit = one if unit is None else unit
    _, _, candidates, active = result
    return result.losses.sum(), factors, candidates, active, derivative, kept, gradient.bias, unit


def _segments(cu_seqlens: Tensor, cu_lists: Tensor, n_tokens: int, rows: int) -> list[Segment]:
    """Runs of whole lists of at most `rows` tokens; a single run if all fit or only the device knows the bounds."""
    n_lists = cu_lists.numel() - 1
    on_host = cu_seqlens.device.type == "cpu" and cu_lists.device.type == "cpu"
    if n_tokens <= rows or not on_host:
        return [Segment(0, n_lists, 0, n_tokens)]
    return list_segments(cu_seqlens, cu_lists, rows)


@linear_list_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, data: Any, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, chunk_bytes, logits_dtype, _, (need_hidden, need_weight, need_bias) = settings
    log_probs, _, derivative = new_log_probs(hidden, need_hidden)
    _, factors, candidates, active = new_list_result(log_probs, ListProblem.unpack(data))
    n_tokens, dtype = hidden.shape[0], log_probs.dtype
    rows = max_rows(weight, logits_dtype, chunk_bytes, need_weight)
    kept, d_bias = new_head_gradient(weight, (need_weight, need_bias), dtype)
    if need_weight and keeps_derivative(n_tokens, weight, rows):
        kept = weight.new_empty(n_tokens, padded(weight.shape[0], weight.dtype))
    total, unit = log_probs.new_empty(()), log_probs.new_empty(())
    return total, factors, candidates, active, derivative, kept, d_bias, unit


@operator("kept_head_gradient")
def kept_head_gradient(
    d: Tensor,  # [T, V padded]
    hidden: Tensor,  # [T, H]
    factors: Tensor,  # [T]
    unit: Tensor,  # []
    grad: Tensor,  # []
    n_vocab: int,
) -> Tensor:
    """dW [V, H] of a list loss whose D was kept."""
    return scaled_product(d[:, :n_vocab], selected(hidden, factors / unit), grad * unit, hidden.dtype)


@kept_head_gradient.register_fake
def _(d: Tensor, hidden: Tensor, factors: Tensor, unit: Tensor, grad: Tensor, n_vocab: int) -> Tensor:
    return hidden.new_empty(n_vocab, hidden.shape[1])


def _list_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, data, *_, chunk_bytes, logits_dtype, _, need = inputs
    _, factors, _, _, derivative, kept, d_bias, unit = output
    rows = max_rows(weight, logits_dtype, chunk_bytes, need[1])
    ctx.of_derivative = bool(need[1]) and keeps_derivative(hidden.shape[0], weight, rows)
    ctx.save_for_backward(factors, derivative, kept, d_bias, unit, hidden if ctx.of_derivative else None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.n_vocab = hidden.dtype, weight.shape[0]
    ctx.no_gradient = no_gradient(data)
    ctx.set_materialize_grads(False)


def _list_loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    first_derivative_only("linear_perpo_loss")
    d_hidden = d_weight = d_bias = None
    if grad is not None:
        factors, derivative, kept, bias_sum, unit, hidden = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_hidden:
            d_hidden = scaled_saved(ctx, derivative, factors * grad, ctx.dtype)
        if need_weight and ctx.of_derivative:
            d_weight = kept_head_gradient(kept, hidden, factors, unit, grad, ctx.n_vocab)
        elif need_weight:
            d_weight = scaled_saved(ctx, kept, grad, ctx.dtype)
        if need_bias:
            d_bias = scaled_saved(ctx, bias_sum, grad, ctx.dtype)
    return d_hidden, d_weight, d_bias, ctx.no_gradient, *(None,) * 7


linear_list_loss.register_autograd(_list_loss_backward, setup_context=_list_loss_setup)
