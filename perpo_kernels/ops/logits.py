"""Log-probs of labels from logits that are there: one read forward, one read and one write backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpo_kernels import backends, checks
from perpo_kernels.ops import first_derivative_only, no_autocast, operator
from perpo_kernels.problem import LogitMap, accumulation_dtype, unpack_numbers


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


@operator("token_log_probs")
def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    numbers: Sequence[float],
    traced: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """logits [..., V], labels [...] -> (log_probs [...], lse [2, rows]). `numbers` or `traced`: the map's
    (`pack_numbers`)."""
    checks.label_values(labels, logits.shape[-1], ignore_index)
    kernels = backends.load(backends.resolve(backend, logits.device.type, logits.dtype))
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    log_probs, lse = kernels.log_prob_rows(_rows_of(logits), labels.reshape(-1).contiguous(), z)
    return log_probs.view(labels.shape), lse


@token_log_probs.register_fake
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(labels.shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return out, out.new_empty(2, labels.numel())


@operator("token_log_probs_backward")
def token_log_probs_backward(
    grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    labels: Tensor,
    numbers: Sequence[float],
    traced: Tensor | None,
    ignore_index: int,
    backend: str,
) -> Tensor:
    rows = _rows_of(logits)
    out = torch.empty_like(rows)
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    _write_gradient(out, grad, rows, labels, lse, z, backend)
    return out.view(logits.shape)


@token_log_probs_backward.register_fake
def _(grad: Tensor, lse: Tensor, logits: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(_rows_of(logits)).view(logits.shape)


@torch.library.custom_op("perpo_kernels::token_log_probs_backward_", mutates_args={"logits"})
@no_autocast
def token_log_probs_backward_(
    grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    labels: Tensor,
    numbers: Sequence[float],
    traced: Tensor | None,
    ignore_index: int,
    backend: str,
) -> None:
    """The gradient overwrites the logits, whose rows must be a view of them."""
    rows = _rows_of(logits)
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    _write_gradient(rows, grad, rows, labels, lse, z, backend)


@token_log_probs_backward_.register_fake
def _(*args: Any) -> None:
    return None


def _write_gradient(
    out: Tensor,  # [B, N, V]
    grad: Tensor,
    rows: Tensor,  # [B, N, V]
    labels: Tensor,
    lse: Tensor,
    z: LogitMap,
    backend: str,
) -> None:
    kernels = backends.load(backends.resolve(backend, rows.device.type, rows.dtype))
    coefficients = grad.to(lse.dtype).reshape(-1).contiguous()
    kernels.grad_rows_(rows, labels.reshape(-1).contiguous(), lse, coefficients, z, out)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.numbers, traced, ctx.ignore_index, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[1], traced)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _token_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("token_log_probs")
    if grad is None:
        return (None,) * 7
    logits, labels, lse, traced = ctx.saved_tensors
    args = (grad, lse, logits, labels, ctx.numbers, traced, ctx.ignore_index, ctx.backend)
    if ctx.inplace and not torch.compiler.is_compiling() and _can_be_overwritten(logits):
        with torch.no_grad():
            token_log_probs_backward_(*args)
        return logits.detach(), *(None,) * 6
    return token_log_probs_backward(*args), *(None,) * 6


token_log_probs.register_autograd(_token_backward, setup_context=_token_setup)
