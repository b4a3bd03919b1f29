"""The list loss of equally long lists on the CPU, of scores and rewards alone: the way around the operator.

The formulas are those of all lists (`perpo_kernels.backends.eager.lists`). What is spared is what takes longer than
they do for a few lists: packing, what the linear loss tells beside its loss, and checks that can name an argument.
"""

import math
from typing import Any

import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.backends.eager.list_terms import Candidates
from perpo_kernels.backends.eager.lists import PAIRS_AT_ONCE, TAME, is_like_perpo, like_perpo, lists_of_k
from perpo_kernels.checks import FLOATS
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import first_derivative_only, is_observed
from perpo_kernels.problem import accumulation_dtype


def equal_list_loss(
    log_probs: Tensor,  # [G, k]
    rewards: Tensor,  # [G, k]
    ref_log_probs: Tensor | None,  # [G, k]
    o: Objective,
    reduction: str,
    backend: str,
) -> Tensor | None:
    """The loss, a scalar or [G] for reduction="none"; or None: what does not fit, or not here, goes by the operator."""
    constants = (rewards,) if ref_log_probs is None else (rewards, ref_log_probs)
    if not _is_dense_here(log_probs) or is_observed(log_probs, *constants) or log_probs.dim() != 2:
        return None
    if not all(_is_dense_here(x) and x.shape == log_probs.shape and not x.requires_grad for x in constants):
        return None
    if o.length_normalized or o.nll_per_token or o.flips or o.pairs == "given":
        return None
    if (o.pointwise == "clipped" and ref_log_probs is None) or (ref_log_probs is not None and not o.reference):
        return None
    n_lists, k = log_probs.shape
    dtype = accumulation_dtype(log_probs.dtype)
    if not 0 < n_lists * k * k <= PAIRS_AT_ONCE or reduction not in ("mean", "sum", "none"):
        return None
    if torch.is_autocast_enabled("cpu") or backends.resolve(backend, "cpu", dtype) != "eager":
        return None
    sums, rewards = log_probs.detach().to(dtype), rewards.to(dtype)
    score = sums if ref_log_probs is None else sums - ref_log_probs.to(dtype)
    share = 1.0 / n_lists if reduction == "mean" else 1.0
    if is_like_perpo(o):
        losses, slope, _ = like_perpo(score, rewards, None, o)
        slope.mul_(o.beta * share)
    else:
        size = torch.linalg.vector_norm(torch.stack([sums, score, rewards]), 1).item() * max(1.0, o.beta)
        if not size < TAME:  # NaN and inf are not below anything
            return None
        everyone = Candidates(score, sums, rewards, None, tame=True)
        losses, slope, likelihood, _ = lists_of_k(everyone, None, None, o)
        slope = (slope if likelihood is None else slope + likelihood) * share
    value = losses.mean() if reduction == "mean" else losses.sum()
    if not math.isfinite(value.item()):
        return None
    if reduction == "none":
        value = losses
    return _Solved.apply(log_probs, (value, slope)) if log_probs.requires_grad else value


def _is_dense_here(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype in FLOATS and x.layout is torch.strided


class _Solved(torch.autograd.Function):
    """A loss whose slope is known."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, solution: tuple[Tensor, Tensor]) -> Tensor:
        loss, slope = solution
        ctx.dtype = log_probs.dtype
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first_derivative_only("list_loss")
        (slope,) = ctx.saved_tensors
        return (slope * (grad.unsqueeze(-1) if grad.dim() else grad)).to(ctx.dtype), None
