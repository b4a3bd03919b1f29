"""From hidden states to log-probs and list losses without holding the logits: chunking, GEMMs and their autograd.

∂log_prob_t/∂logits_t = onehot(y_t) − softmax_t does not depend on the loss. So the forward pass takes T tokens a
chunk at a time:

    Z = X_c Wᵀ (GEMM)      log_prob, and Z overwritten by D = onehot − softmax (row kernel)      U_c = D W (GEMM)

and keeps U [T, H], in fp32. The backward pass is a row scale, dX = g ⊙ U, for any loss above. A frozen head is done
with that: two GEMMs for forward and backward. A trainable head needs dW = Dᵀ (g ⊙ X):

- under a list loss, g is known once a whole list has been seen, so chunks of whole lists add their share while D is
  still in memory: three GEMMs. A list that does not fit the budget is swept twice, four GEMMs.
- under an unknown loss, D is made again in the backward pass: four GEMMs.

dW is summed in fp32. Under no_grad there is one GEMM and D is never formed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpo_kernels.backends import ListProblem
from perpo_kernels.chunks import HeadGradient, bind_head, chunks, kept_rows, multiply
from perpo_kernels.layout import Segment, list_segments
from perpo_kernels.objectives import Objective
from perpo_kernels.ops.lists import (
    accumulation_dtype,
    check_cumulative,
    check_flip_probs,
    check_labels,
    check_pair_weights,
    first_derivative_only,
    list_problem,
    new_list_result,
    no_autocast,
    run_list_loss,
)

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
    kept = kept_rows(labels, ignore_index)
    if kept is not None:
        options = (bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend, keep_derivative)
        log_probs, lse, derivative = linear_log_probs(hidden[kept], weight, labels[kept], *options)
        n = len(labels)
        return (
            log_probs.new_zeros(n).index_copy_(0, kept, log_probs),
            lse.new_zeros(2, n).index_copy_(1, kept, lse),
            lse.new_zeros(n, hidden.shape[1]).index_copy_(0, kept, derivative) if keep_derivative else derivative,
        )
    head = bind_head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    lse = log_probs.new_empty(2, n_tokens)
    derivative = lse.new_empty(n_tokens if keep_derivative else 0, n_hidden)
    rows = head.chunk_rows(n_tokens)
    buffer = head.buffer(rows)
    step = head.kernels.fused_rows_ if keep_derivative else head.kernels.log_prob_rows
    for c in chunks(0, n_tokens, rows):
        z = head.project(hidden[c], buffer)
        log_probs[c], lse[:, c] = step(z, labels[c], head.z)
        if keep_derivative:
            multiply(z, weight, derivative[c])
    return log_probs, lse, derivative


@linear_log_probs.register_fake
def _(hidden: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep_derivative = options[-1]
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_empty(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    derivative = log_probs.new_empty(n_tokens if keep_derivative else 0, n_hidden)
    return log_probs, log_probs.new_empty(2, n_tokens), derivative


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
    kept = kept_rows(labels, ignore_index)
    if kept is not None:
        grad, hidden, labels, lse = grad[kept], hidden[kept], labels[kept], lse[:, kept]
    head = bind_head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    total = HeadGradient(head, need_weight, need_bias)
    rows = head.chunk_rows(hidden.shape[0])
    buffer = head.buffer(rows)
    for c in chunks(0, hidden.shape[0], rows):
        z = head.project(hidden[c], buffer)
        head.kernels.grad_rows_(z, labels[c], lse[:, c].contiguous(), None, head.z, z)
        total.add(z, hidden[c], grad[c], labels[c])
    return total.weight.to(weight.dtype, copy=False), total.bias.to(weight.dtype)


@linear_log_probs_head_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    need_weight, need_bias = options[-2:]
    return weight.new_empty(weight.shape if need_weight else (0, 0)), weight.new_empty(
        weight.shape[0] if need_bias else 0
    )


@torch.library.custom_op("perpo_kernels::scaled", mutates_args=())
@no_autocast
def scaled(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g · x (g broadcasts against x) in `dtype`: rounded once, and without a copy in the higher precision."""
    return torch.mul(x, g, out=torch.empty_like(x, dtype=dtype))


@scaled.register_fake
def _(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, bias, *ctx.options, _ = inputs
    _, lse, derivative = output
    need_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    ctx.hidden_dtype = hidden.dtype
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
    d_hidden = scaled(derivative, grad.unsqueeze(1), ctx.hidden_dtype) if need_hidden else None
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
    token_weights: Tensor | None,
    pair_weights: Tensor | None,
    flip_probs: Tensor | None,
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
    accumulation precision and multiples of `_coefficient_unit`, db [V] or [0] likewise. dX = coefficients ⊙ U.
    """
    check_labels(labels, weight.shape[0], ignore_index)
    check_cumulative("cu_lists", cu_lists, rewards.numel(), "candidates")
    check_cumulative("cu_seqlens", cu_seqlens, hidden.shape[0], "tokens")
    check_pair_weights(pair_weights, cu_lists)
    check_flip_probs(flip_probs)
    head = bind_head(weight, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes, backend)
    n_tokens, n_hidden = hidden.shape
    log_probs = hidden.new_zeros(n_tokens, dtype=accumulation_dtype(hidden.dtype))
    problem = list_problem(
        ListProblem(
            log_probs,
            rewards,
            cu_lists,
            Objective.from_numbers(objective),
            cu_seqlens,
            labels,
            ignore_index,
            ref_log_probs,
            token_weights=token_weights,
            pair_weights=pair_weights,
            flip_probs=flip_probs,
        )
    )
    result = new_list_result(problem)
    derivative = log_probs.new_empty(n_tokens if need_hidden else 0, n_hidden)
    gradient = HeadGradient(head, need_weight, need_bias)
    rows = head.max_rows()
    buffer = head.buffer(min(rows, n_tokens))
    unit = _coefficient_unit(problem.objective)

    def close_lists(segment: Segment) -> None:
        lists = slice(segment.first_list, segment.last_list)
        part = problem._replace(
            cu_lists=problem.cu_lists[segment.first_list : segment.last_list + 1],
            pair_weights=None if problem.pair_weights is None else problem.pair_weights[lists],
        )
        run_list_loss(part, backend, result._replace(losses=result.losses[lists], stats=result.stats[:, lists]))

    def add_chunk(z: Tensor, c: slice) -> None:
        if need_hidden:
            multiply(z, weight, derivative[c])
        gradient.add(z, hidden[c], result.coefficients[c] / unit, labels[c])

    for segment in _segments(cu_seqlens, cu_lists, n_tokens, rows):
        tokens = slice(segment.first_token, segment.last_token)
        if segment.last_token == segment.first_token:
            close_lists(segment)
            continue
        if segment.last_token - segment.first_token <= rows:
            z = head.project(hidden[tokens], buffer)
            log_probs[tokens], _ = head.kernels.fused_rows_(z, labels[tokens], head.z)
            close_lists(segment)
            add_chunk(z, tokens)
            continue
        lse = log_probs.new_empty(2, n_tokens)
        pieces = list(chunks(segment.first_token, segment.last_token, rows))
        for c in pieces:
            log_probs[c], lse[:, c] = head.kernels.log_prob_rows(head.project(hidden[c], buffer), labels[c], head.z)
        close_lists(segment)
        for c in pieces:
            z = head.project(hidden[c], buffer)
            head.kernels.grad_rows_(z, labels[c], lse[:, c].contiguous(), None, head.z, z)
            add_chunk(z, c)
    return (
        result.losses.sum(),
        result.coefficients,
        result.sequence_log_probs,
        result.stats,
        derivative,
        gradient.weight,
        gradient.bias,
    )


def _coefficient_unit(objective: Objective) -> float:
    """What |∂L/∂s| is about; g ⊙ X is formed in multiples of it, so that fp16 neither overflows nor fades."""
    return 2 / objective.beta if objective.link == "squared" else objective.beta


def _segments(cu_seqlens: Tensor, cu_lists: Tensor, n_tokens: int, rows: int) -> list[Segment]:
    """Runs of whole lists of at most `rows` tokens; a single run if all fit or only the device knows the bounds."""
    n_lists = cu_lists.numel() - 1
    on_host = cu_seqlens.device.type == "cpu" and cu_lists.device.type == "cpu"
    if n_tokens <= rows or not on_host:
        return [Segment(0, n_lists, 0, n_tokens)]
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
        new(n_tokens if need_hidden else 0, n_hidden),
        new(*(weight.shape if need_weight else (0, 0))),
        new(weight.shape[0] if need_bias else 0),
    )


def _linear_list_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, coefficients, _, _, derivative, d_weight, d_bias = output
    ctx.save_for_backward(coefficients, derivative, d_weight, d_bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.hidden_dtype, ctx.weight_dtype = inputs[0].dtype, inputs[1].dtype
    ctx.unit = _coefficient_unit(Objective.from_numbers(inputs[-4]))
    ctx.set_materialize_grads(False)


def _linear_list_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("linear_perpo_loss")
    if grad is None:
        return (None,) * 21
    coefficients, derivative, d_weight, d_bias = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    return (
        scaled(derivative, (coefficients * grad).unsqueeze(1), ctx.hidden_dtype) if need_hidden else None,
        scaled(d_weight, grad * ctx.unit, ctx.weight_dtype) if need_weight else None,
        None,
        scaled(d_bias, grad * ctx.unit, ctx.weight_dtype) if need_bias else None,
        *(None,) * 17,
    )


linear_list_loss.register_autograd(_linear_list_backward, setup_context=_linear_list_setup)
