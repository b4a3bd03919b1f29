"""The differentiable operators on logits and on lists, registered with torch (`torch.ops.perpo_kernels.*`).

A torch operator keeps torch.compile from looking inside, gives it shapes through a fake implementation, and carries
the derivative. The operators take plain values; names are checked and defaults filled in by
`perpo_kernels.functional`. Value checks that need the data (a label out of range) are made here, where the data is.
"""

import functools
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from perpo_kernels import backends, layout
from perpo_kernels.backends import ListProblem, ListResult, LogitMap
from perpo_kernels.objectives import Objective

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an operator in the dtypes it was given: autocast was applied to its inputs and must not act inside."""

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapped


def values_are_checked(x: Tensor) -> bool:
    """Whether the values of x may be looked at: on the CPU always; on a device, which it would stall, on request."""
    return x.device.type == "cpu" or os.environ.get("PERPO_CHECK", "0") not in ("", "0")


def check_labels(labels: Tensor, n_vocab: int, ignore_index: int) -> None:
    if not values_are_checked(labels):
        return
    wrong = ((labels < 0) | (labels >= n_vocab)) & (labels != ignore_index)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels must lie in [0, {n_vocab}) or be ignore_index={ignore_index}; "
            f"{int(wrong.sum())} do not, the first is {int(labels[tuple(at)])} at {at}"
        )


def check_cumulative(name: str, counts: Tensor, total: int, of: str) -> None:
    if not values_are_checked(counts):
        return
    values = counts.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in pairwise(values)):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the number of {of}, {total}; got "
            f"{counts.tolist() if counts.numel() <= 16 else f'{counts[:8].tolist()} … {counts[-4:].tolist()}'}"
        )


def check_pair_weights(pair_weights: Tensor | None, cu_lists: Tensor) -> None:
    if pair_weights is None or cu_lists.numel() < 2 or not values_are_checked(cu_lists):
        return
    longest = int(cu_lists.diff().max())
    if pair_weights.shape[-1] < longest:
        raise ValueError(
            f"pair_weights must be [G, k, k] with k at least {longest}, the longest list, "
            f"got {list(pair_weights.shape)}"
        )


def check_flip_probs(flip_probs: Tensor | None) -> None:
    if flip_probs is None or not values_are_checked(flip_probs):
        return
    wrong = ~((flip_probs >= 0) & (flip_probs <= 1))
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"flip_probs must be probabilities in [0, 1], got {flip_probs.flatten()[at].item()} at {at}")


def first_derivative_only(op: str) -> None:
    """Called in each backward: what it reads was saved as a constant; differentiating it would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has first derivatives only, and its backward pass was run with create_graph=True; "
            'use backend="reference" for higher derivatives'
        )


# ----------------------------------------------------------------------------------------------- log-probs from logits


def _rows_of(logits: Tensor) -> Tensor:
    """[..., V] -> [B, N, V]; a view for everything a trainer makes, such as logits[:, :-1], else a copy."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.flatten(0, -3)


def _can_be_overwritten(logits: Tensor) -> bool:
    """Whether the rows of logits are a view of them, and each element is there once."""
    distinct = all(stride or size == 1 for size, stride in zip(logits.shape, logits.stride(), strict=True))
    return distinct and _rows_of(logits).data_ptr() == logits.data_ptr()


@torch.library.custom_op("perpo_kernels::token_log_probs", mutates_args=())
@no_autocast
def token_log_probs(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """logits [..., V], labels [...] -> (log_probs [...], lse [2, rows])."""
    check_labels(labels, logits.shape[-1], ignore_index)
    kernels = backends.load(backends.resolve(backend, logits.device.type, logits.dtype))
    z = LogitMap(temperature, ignore_index=ignore_index)
    log_probs, lse = kernels.log_prob_rows(_rows_of(logits), labels.reshape(-1).contiguous(), z)
    return log_probs.view(labels.shape), lse


@token_log_probs.register_fake
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(labels.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return out, out.new_empty(2, labels.numel())


@torch.library.custom_op("perpo_kernels::token_log_probs_backward", mutates_args=())
@no_autocast
def token_log_probs_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, temperature: float, ignore_index: int, backend: str
) -> Tensor:
    rows = _rows_of(logits)
    out = torch.empty_like(rows)
    _write_gradient(out, grad, rows, labels, lse, temperature, ignore_index, backend)
    return out.view(logits.shape)


@token_log_probs_backward.register_fake
def _(grad: Tensor, logits: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(_rows_of(logits)).view(logits.shape)


@torch.library.custom_op("perpo_kernels::token_log_probs_backward_", mutates_args={"logits"})
@no_autocast
def token_log_probs_backward_(
    grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, temperature: float, ignore_index: int, backend: str
) -> None:
    """The gradient overwrites the logits, whose rows must be a view of them."""
    rows = _rows_of(logits)
    _write_gradient(rows, grad, rows, labels, lse, temperature, ignore_index, backend)


@token_log_probs_backward_.register_fake
def _(*args: Any) -> None:
    return None


def _write_gradient(
    out: Tensor,  # [B, N, V]
    grad: Tensor,
    rows: Tensor,  # [B, N, V]
    labels: Tensor,
    lse: Tensor,
    temperature: float,
    ignore_index: int,
    backend: str,
) -> None:
    kernels = backends.load(backends.resolve(backend, rows.device.type, rows.dtype))
    z = LogitMap(temperature, ignore_index=ignore_index)
    coefficients = grad.to(lse.dtype).reshape(-1).contiguous()
    kernels.grad_rows_(rows, labels.reshape(-1).contiguous(), lse, coefficients, z, out)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.temperature, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _token_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("token_log_probs")
    if grad is None:
        return (None,) * 6
    logits, labels, lse = ctx.saved_tensors
    args = (grad, logits, labels, lse, ctx.temperature, ctx.ignore_index, ctx.backend)
    if ctx.inplace and not torch.compiler.is_compiling() and _can_be_overwritten(logits):
        with torch.no_grad():
            token_log_probs_backward_(*args)
        return logits.detach(), None, None, None, None, None
    return token_log_probs_backward(*args), None, None, None, None, None


token_log_probs.register_autograd(_token_backward, setup_context=_token_setup)


# ------------------------------------------------------------------------------------------------------- the list loss


def list_problem(problem: ListProblem) -> ListProblem:
    """The problem with every tensor dense and where the log-probs are: a layout may come from the CPU."""
    device = problem.log_probs.device
    fields: dict[str, Any] = problem._asdict()
    for name, x in fields.items():
        if isinstance(x, Tensor):
            fields[name] = x.to(device, non_blocking=True).contiguous()
    return ListProblem(**fields)


def run_list_loss(problem: ListProblem, backend: str, result: ListResult) -> None:
    dtype = result.losses.dtype
    kernels = backends.load(backends.resolve(backend, problem.log_probs.device.type, dtype))
    kernels.list_loss(problem, result)


def new_list_result(problem: ListProblem) -> ListResult:
    """To be written by `run_list_loss`, every entry of it: filling it first would be four launches more."""
    n_lists = problem.cu_lists.numel() - 1
    dtype = accumulation_dtype(problem.log_probs.dtype)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=problem.log_probs.device)

    return ListResult(
        losses=new(n_lists),
        coefficients=new(problem.log_probs.numel()),
        sequence_log_probs=new(problem.rewards.numel()),
        stats=new(4, n_lists),
    )


@torch.library.custom_op("perpo_kernels::list_loss", mutates_args=())
@no_autocast
def list_loss(
    log_probs: Tensor,
    rewards: Tensor,
    cu_lists: Tensor,
    objective: Sequence[float],
    cu_seqlens: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    ref_log_probs: Tensor | None,
    valid: Tensor | None,
    lengths: Tensor | None,
    token_weights: Tensor | None,
    pair_weights: Tensor | None,
    flip_probs: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (Σ losses [], losses [G], coefficients [T or S], sequence_log_probs [S], stats [4, G])."""
    check_cumulative("cu_lists", cu_lists, rewards.numel(), "candidates")
    if cu_seqlens is not None:
        check_cumulative("cu_seqlens", cu_seqlens, log_probs.numel(), "tokens")
    check_pair_weights(pair_weights, cu_lists)
    check_flip_probs(flip_probs)
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
            valid,
            lengths,
            token_weights,
            pair_weights,
            flip_probs,
        )
    )
    result = new_list_result(problem)
    run_list_loss(problem, backend, result)
    return (result.losses.sum(), *result)


@list_loss.register_fake
def _(
    log_probs: Tensor, rewards: Tensor, cu_lists: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_lists = cu_lists.shape[0] - 1
    dtype = accumulation_dtype(log_probs.dtype)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=log_probs.device)

    return new(), new(n_lists), new(log_probs.shape[0]), new(rewards.shape[0]), new(4, n_lists)


def _list_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    log_probs, _, cu_lists, _, cu_seqlens, *_ = inputs
    ctx.save_for_backward(output[2], cu_lists, cu_seqlens)
    ctx.mark_non_differentiable(*output[2:])
    ctx.dtype = log_probs.dtype
    ctx.set_materialize_grads(False)


def _list_backward(
    ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    first_derivative_only("list_loss")
    coefficients, cu_lists, cu_seqlens = ctx.saved_tensors
    return (coefficient_gradient(coefficients, grad_total, grad_losses, cu_lists, cu_seqlens, ctx.dtype), *(None,) * 13)


def coefficient_gradient(
    coefficients: Tensor,  # [T] or [S]
    grad_total: Tensor | None,  # []
    grad_losses: Tensor | None,  # [G]
    cu_lists: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """coefficients · (∂/∂Σ losses + ∂/∂losses of the list that each belongs to)."""
    if grad_total is None and grad_losses is None:
        return None
    scale = grad_total
    if grad_losses is not None:
        device = coefficients.device
        n_candidates = coefficients.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        lists = layout.owner(cu_lists.to(device), n_candidates)
        if cu_seqlens is not None:
            lists = lists[layout.owner(cu_seqlens.to(device), coefficients.shape[0])]
        per_item = grad_losses[lists]
        scale = per_item if scale is None else scale + per_item
    assert scale is not None
    return (coefficients * scale).to(dtype)


list_loss.register_autograd(_list_backward, setup_context=_list_setup)
