"""The list loss as an operator: from log-probs of tokens or of whole responses to the loss of each list."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpo_kernels import backends, checks, layout
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import first_derivative_only, no_gradient, operator
from perpo_kernels.problem import ListProblem, ListResult, accumulation_dtype, unpack_numbers


def on_device(problem: ListProblem, device: torch.device) -> ListProblem:
    """The problem with every tensor dense and where the log-probs are: a layout may come from the CPU."""
    for x in problem.pack():
        if x is not None and (x.device != device or not x.is_contiguous()):
            return problem.each(lambda x: x.to(device, non_blocking=True).contiguous())
    return problem


def new_list_result(log_probs: Tensor, problem: ListProblem) -> ListResult:
    """To be written by a backend's `list_loss`, every entry of it: filling it first would be four launches more."""
    n_lists, n_candidates = problem.cu_lists.shape[0] - 1, problem.rewards.shape[0]
    coefficients = log_probs.new_empty(log_probs.shape[0], dtype=accumulation_dtype(log_probs.dtype))
    new = coefficients.new_empty  # cheaper on the host than with a dtype and a device
    return ListResult(new(n_lists), coefficients, new(3, n_candidates), new(n_lists))


@operator("list_loss")
def list_loss(
    log_probs: Tensor,  # [T] or [S]
    data: Sequence[Tensor | None],  # of ListProblem.pack
    numbers: Sequence[float],  # of the objective, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> Σ losses [], losses [G], coefficients [T or S], candidates [3, S], active [G]."""
    objective = Objective.from_numbers(unpack_numbers(numbers, traced))
    problem = ListProblem.unpack(data, ignore_index, objective)
    checks.list_values(problem, log_probs.shape[0])
    problem = on_device(problem, log_probs.device)
    result = new_list_result(log_probs, problem)
    kernels = backends.load(backends.resolve(backend, log_probs.device.type, result.losses.dtype))
    kernels.list_loss(log_probs.contiguous(), problem, result)
    return (result.losses.sum(), *result)


@list_loss.register_fake
def _(log_probs: Tensor, data: Sequence[Tensor | None], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    result = new_list_result(log_probs, ListProblem.unpack(data))
    return (result.losses.new_empty(()), *result)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    log_probs, data, *_ = inputs
    _, _, coefficients, candidates, active = output
    problem = ListProblem.unpack(data)
    ctx.save_for_backward(coefficients, problem.cu_lists, problem.cu_seqlens)
    ctx.mark_non_differentiable(coefficients, candidates, active)
    ctx.dtype, ctx.no_gradient = log_probs.dtype, no_gradient(data)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, *_: None) -> tuple[Any, ...]:
    """coefficients · (∂/∂Σ losses + ∂/∂losses of the list that each belongs to)."""
    first_derivative_only("list_loss")
    coefficients, cu_lists, cu_seqlens = ctx.saved_tensors
    scale = grad_total
    if grad_losses is not None:
        device = coefficients.device
        n_candidates = coefficients.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        lists = layout.owner(cu_lists.to(device, non_blocking=True), n_candidates)
        if cu_seqlens is not None:
            lists = lists[layout.owner(cu_seqlens.to(device, non_blocking=True), coefficients.shape[0])]
        per_item = grad_losses[lists]
        scale = per_item if scale is None else scale + per_item
    gradient = None if scale is None else (coefficients * scale).to(ctx.dtype)
    return gradient, ctx.no_gradient, None, None, None, None


list_loss.register_autograd(_backward, setup_context=_setup)
