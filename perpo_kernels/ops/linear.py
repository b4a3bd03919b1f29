"""From hidden states to log-probs and list losses without holding the logits: chunking, GEMMs and their autograd.

∂log_prob_t/∂logits_t = onehot(y_t) − softmax_t does not depend on the loss. So the forward pass takes T tokens
chunk by chunk:

    Z = X_c Wᵀ (GEMM)      log_prob, and Z overwritten by D = onehot − softmax (row kernel)      U_c = D W (GEMM)

and keeps U [T, H], in fp32. The backward pass is a row scale, dX = g ⊙ U, for any loss above. A frozen head needs
no more: two GEMMs for forward and backward. A trainable head needs dW = Dᵀ (g ⊙ X):

- under a list loss, g is known as soon as all log-probs of a list are, so chunks of whole lists add their share while
  D is still in memory: three GEMMs. A list that does not fit the budget is computed twice: four GEMMs.
- under an unknown loss, D is recomputed in the backward pass: four GEMMs.

dW is summed in fp32. Under no_grad there is one GEMM and D is never formed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpo_kernels import checks
from perpo_kernels.chunks import HeadGradient, bind_head, chunks, kept_rows, multiply
from perpo_kernels.layout import Segment, list_segments
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import first_derivative_only, no_autocast, no_gradient
from perpo_kernels.ops.lists import new_list_result, on_device
from perpo_kernels.problem import ListProblem, LogitMap, accumulation_dtype, unpack_numbers

N_MAP = len(LogitMap().numbers())

# ------------------------------------------------------------------------------------------------ log-probs of tokens


@torch.library.custom_op("perpo_kernels::linear_log_probs", mutates_args=())
@no_autocast
def linear_log_probs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T]
    numbers: Sequence[float],  # of the map, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    chunk_bytes: int,
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
    head = bind_head(weight, bias, z, chunk_bytes, backend)
    log_probs, lse, derivative = _new_log_probs(hidden, keep_derivative)
    rows = head.chunk_rows(hidden.shape[0])
    buffer = head.buffer(rows)
    step = head.kernels.fused_rows_ if keep_derivative else head.kernels.log_prob_rows
    for c in chunks(0, hidden.shape[0], rows):
        raw = head.project(hidden[c], buffer)
        log_probs[c], lse[:, c] = step(raw, labels[c], z)
        if keep_derivative:
            multiply(raw, weight, derivative[c])
    return log_probs, lse, derivative


def _new_log_probs(hidden: Tensor, keep_derivative: bool) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    return (
        log_probs,
        log_probs.new_empty(2, n_tokens),
        log_probs.new_empty(n_tokens if keep_derivative else 0, n_hidden),
    )


@linear_log_probs.register_fake
def _(hidden: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_log_probs(hidden, keep_derivative=settings[-1])


@torch.library.custom_op("perpo_kernels::linear_log_probs_head_backward", mutates_args=())
@no_autocast
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
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """-> dW [V, H] and db [V], or empty, as `need` says; the logits are recomputed chunk by chunk."""
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    head = bind_head(weight, bias, z, chunk_bytes, backend)
    kept = kept_rows(labels, head.z.ignore_index)
    if kept is not None:
        grad, hidden, labels, lse = grad[kept], hidden[kept], labels[kept], lse[:, kept]
    total = HeadGradient(head, *need)
    unit = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny) if len(grad) else grad.new_ones(())
    grad = grad / unit  # of size 1: g ⊙ X then neither overflows nor underflows in fp16, whatever the loss scale
    rows = head.chunk_rows(hidden.shape[0])
    buffer = head.buffer(rows)
    for c in chunks(0, hidden.shape[0], rows):
        raw = head.project(hidden[c], buffer)
        head.kernels.grad_rows_(raw, labels[c], lse[:, c].contiguous(), None, head.z, raw)
        total.add(raw, hidden[c], grad[c])
    return total.weight.mul_(unit).to(weight.dtype, copy=False), total.bias.mul_(unit).to(weight.dtype)


@linear_log_probs_head_backward.register_fake
def _(grad: Any, lse: Any, hidden: Any, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _new_head_gradient(weight, settings[-1], weight.dtype)


def _new_head_gradient(weight: Tensor, need: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = need
    return (
        weight.new_empty(weight.shape if need_weight else (0, 0), dtype=dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype),
    )


@torch.library.custom_op("perpo_kernels::scaled", mutates_args=())
@no_autocast
def scaled(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g · x in `dtype`, rounded once and without a copy in the higher precision. x [T, H] with g [T]; or g is a scalar.

    Rows with g = 0 are 0 whatever x holds there: what takes part in nothing is selected away, not multiplied by 0.
    """
    if g.dim() == 0:
        return torch.mul(x, g, out=torch.empty_like(x, dtype=dtype))
    out = torch.mul(x, g.unsqueeze(1), out=torch.empty_like(x, dtype=dtype))
    return out.masked_fill_((g == 0).unsqueeze(1), 0.0)


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
            d_hidden = scaled(derivative, grad, ctx.hidden_dtype)
        if any(need):
            gradients = linear_log_probs_head_backward(grad, *saved, labels, ctx.numbers, traced, *ctx.settings, need)
            d_weight, d_bias = (x if needed else None for x, needed in zip(gradients, need, strict=True))
    return d_hidden, d_weight, d_bias, *(None,) * 7


linear_log_probs.register_autograd(_log_probs_backward, setup_context=_log_probs_setup)


# ------------------------------------------------------------------------------- the list loss over a trainable head


@torch.library.custom_op("perpo_kernels::linear_list_loss", mutates_args=())
@no_autocast
def linear_list_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    data: Sequence[Tensor | None],  # of ListProblem.pack
    numbers: Sequence[float],  # of the map, then of the objective, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    chunk_bytes: int,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and every gradient in one pass over chunks of whole lists.

    `need`: whether gradients of hidden, weight and bias are needed. -> Σ losses [], coefficients [T], candidates
    [3, S], active [G], U [T, H] or [0, H], dW [V, H] or [0, 0] in accumulation precision and multiples of the unit,
    db [V] or [0] likewise, the unit []. dX = coefficients ⊙ U.
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
    head = bind_head(weight, bias, z, chunk_bytes, backend)
    need_hidden, *need_head = need
    log_probs, lse, derivative = _new_log_probs(hidden, need_hidden)
    log_probs.zero_()
    result = new_list_result(log_probs, problem)
    gradient = HeadGradient(head, *need_head)
    rows = head.max_rows()
    buffer = head.buffer(min(rows, hidden.shape[0]))
    unit: float | Tensor = _coefficient_unit(problem.objective)
    if problem.list_weights is not None and problem.list_weights.numel() > 0:
        largest = problem.list_weights.to(log_probs.dtype).amax()
        unit = unit * largest.where(largest > 0, 1.0)

    def close_lists(segment: Segment) -> None:
        lists = slice(segment.first_list, segment.last_list)
        part = problem._replace(
            cu_lists=problem.cu_lists[segment.first_list : segment.last_list + 1],
            pair_weights=None if problem.pair_weights is None else problem.pair_weights[lists],
            list_weights=None if problem.list_weights is None else problem.list_weights[lists],
        )
        of_lists = result._replace(losses=result.losses[lists], active=result.active[lists])
        head.kernels.list_loss(log_probs, part, of_lists)

    def add_chunk(raw: Tensor, c: slice) -> None:
        if need_hidden:
            multiply(raw, weight, derivative[c])
        g = (result.coefficients[c] / unit).masked_fill_(labels[c] == ignore_index, 0.0)
        gradient.add(raw, hidden[c], g)

    for segment in _segments(cu_seqlens, cu_lists, hidden.shape[0], rows):
        tokens = slice(segment.first_token, segment.last_token)
        if segment.last_token == segment.first_token:
            close_lists(segment)
            continue
        if segment.last_token - segment.first_token <= rows:
            raw = head.project(hidden[tokens], buffer)
            log_probs[tokens], _ = head.kernels.fused_rows_(raw, labels[tokens], z)
            close_lists(segment)
            add_chunk(raw, tokens)
            continue
        pieces = list(chunks(segment.first_token, segment.last_token, rows))
        for c in pieces:
            log_probs[c], lse[:, c] = head.kernels.log_prob_rows(head.project(hidden[c], buffer), labels[c], z)
        close_lists(segment)
        for c in pieces:
            raw = head.project(hidden[c], buffer)
            head.kernels.grad_rows_(raw, labels[c], lse[:, c].contiguous(), None, z, raw)
            add_chunk(raw, c)
    _, coefficients, candidates, active = result
    scale = unit if isinstance(unit, Tensor) else log_probs.new_full((), unit)
    return result.losses.sum(), coefficients, candidates, active, derivative, gradient.weight, gradient.bias, scale


def _coefficient_unit(objective: Objective) -> float:
    """What |∂L/∂s| is about; g ⊙ X is formed in multiples of it, so that fp16 neither overflows nor underflows."""
    o = objective
    sizes = [
        o.nll,
        o.beta * o.list_scale * (o.list_term != "none"),
        o.beta * o.pointwise_scale * (o.pointwise != "none"),
    ]
    if o.pairs != "none":
        sizes.append(o.pair_scale * (2 / o.beta if o.link == "squared" else o.beta))
    return max(sizes)


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
    need_hidden, *need_head = settings[-1]
    log_probs, _, derivative = _new_log_probs(hidden, need_hidden)
    _, coefficients, candidates, active = new_list_result(log_probs, ListProblem.unpack(data))
    d_head = _new_head_gradient(weight, need_head, log_probs.dtype)
    total, unit = log_probs.new_empty(()), log_probs.new_empty(())
    return total, coefficients, candidates, active, derivative, *d_head, unit


def _list_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, data, *_ = inputs
    _, coefficients, _, _, derivative, d_weight, d_bias, unit = output
    ctx.save_for_backward(coefficients, derivative, d_weight, d_bias, unit)
    ctx.mark_non_differentiable(*output[1:])
    ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
    ctx.no_gradient = no_gradient(data)
    ctx.set_materialize_grads(False)


def _list_loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    first_derivative_only("linear_perpo_loss")
    d_hidden = d_weight = d_bias = None
    if grad is not None:
        coefficients, derivative, weight_sum, bias_sum, unit = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_hidden:
            d_hidden = scaled(derivative, coefficients * grad, ctx.hidden_dtype)
        if need_weight:
            d_weight = scaled(weight_sum, grad * unit, ctx.weight_dtype)
        if need_bias:
            d_bias = scaled(bias_sum, grad * unit, ctx.weight_dtype)
    return d_hidden, d_weight, d_bias, ctx.no_gradient, *(None,) * 6


linear_list_loss.register_autograd(_list_loss_backward, setup_context=_list_loss_setup)
