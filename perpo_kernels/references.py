"""Several reference models as one: the reference of MRPO (Multi-Reference Preference Optimization, arXiv 2405.16388).

For references π_1 … π_n with weights α_k ≥ 0, Σ_k α_k = 1, staying near all of them costs Σ_k α_k KL(π ‖ π_k). That has
no closed-form solution of the shape that DPO needs, but by Jensen's inequality

    Σ_k α_k E_π log(π / π_k)  ≤  E_π log Σ_k α_k π / π_k  =  E_π log(π / π̃),     π̃ = 1 / Σ_k (α_k / π_k)

so KL to the harmonic mean π̃ (not normalised; the constant cancels between the answers to one prompt) bounds it, and DPO
and its kin apply with π̃ for π_ref. In logarithms of whole responses:

    log π̃ = −log Σ_k exp(log α_k − log π_k)

It lies between the smallest and the largest of log π_k, near the smallest: the reference that likes an answer least
decides. The mixture does not depend on the policy, so it is made once, and the losses take it as `ref_log_probs`.
The paper's clipping of references that are far from the first one is not part of this function.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from perpo_kernels import checks
from perpo_kernels.problem import accumulation_dtype

TOLERANCE = 1e-4  # of the sum of the weights; in a low precision, one rounding of 1


def combine_references(
    ref_log_probs: Tensor | Sequence[Tensor],  # [n, ...], or n tensors [...]
    weights: Tensor | Sequence[float] | None = None,  # [n], or [n, ...] for weights of each response
) -> Tensor:  # [...]
    """−log Σ_k α_k exp(−ref_k): sequence log-probs under several references as one `ref_log_probs` of the losses.

    Args:
        ref_log_probs: [n, S], Σ_t log π_k(y_t) of each of n references.
        weights: α, ≥ 0 with sum 1 over the references; None: 1/n each. A tensor [n, S] weighs the references of each
            response anew, as the paper's adaptive weights do. Values of a tensor on a GPU are looked at only with
            PERPO_CHECK=1, since looking would cost a synchronisation, and never under torch.compile.

    Returns:
        [S], fp32 (fp64 for fp64 log-probs). A reference of weight 0 takes no part, whatever its log-probs are.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.

    Example:
        >>> import torch, perpo_kernels as pk
        >>> pk.combine_references(torch.tensor([[-3.0], [-3.0]]))
        tensor([-3.])
    """
    references = _stacked(ref_log_probs)
    alpha = _alpha(weights, references)
    alpha = alpha.reshape(alpha.shape + (1,) * (references.dim() - alpha.dim()))
    return -(alpha.log() - references).masked_fill(alpha == 0, -math.inf).logsumexp(0)


def _stacked(ref_log_probs: Tensor | Sequence[Tensor]) -> Tensor:  # [n, ...]
    if not isinstance(ref_log_probs, Tensor):
        given = list(ref_log_probs)
        for k, x in enumerate(given):
            checks.floating(f"ref_log_probs[{k}]", x)
            if x.shape != given[0].shape or x.device != given[0].device:
                raise ValueError(
                    f"ref_log_probs[{k}] must have the shape and device of ref_log_probs[0], {list(given[0].shape)} on "
                    f"{given[0].device}, got {list(x.shape)} on {x.device}"
                )
        if not given:
            raise ValueError("ref_log_probs must hold at least one reference, got none")
        ref_log_probs = torch.stack(given)
    checks.floating("ref_log_probs", ref_log_probs)
    if ref_log_probs.shape[0] == 0:
        raise ValueError("ref_log_probs must be [n, S] with at least one reference, got n = 0")
    return ref_log_probs.to(accumulation_dtype(ref_log_probs.dtype))


def _alpha(weights: Tensor | Sequence[float] | None, references: Tensor) -> Tensor:
    n = references.shape[0]
    if weights is None:
        return references.new_full((n,), 1 / n)
    if not isinstance(weights, Tensor):
        _check_numbers(list(weights), n)
        return torch.tensor(list(weights), dtype=references.dtype).to(references.device, non_blocking=True)
    checks.floating("weights", weights)
    if weights.shape not in ((n,), references.shape):
        raise ValueError(
            f"weights must be [n] = [{n}] or have the shape of ref_log_probs, {list(references.shape)}; got "
            f"{list(weights.shape)}"
        )
    checks.same_device("weights", weights, references.device)
    wide = weights.to(references.dtype)
    sums = wide.sum(0)
    if checks.values_are_checked(weights) and not torch.compiler.is_compiling():
        tolerance = max(TOLERANCE, torch.finfo(weights.dtype).eps)
        if not bool((weights >= 0).all()) or not bool(((sums - 1).abs() <= tolerance).all()):
            raise ValueError("weights must be ≥ 0 and add up to 1 over the references (dim 0)")
    return wide / sums if weights.dtype != wide.dtype else wide  # three thirds in bf16 add up to 1.002


def _check_numbers(weights: list[float], n: int) -> None:
    if len(weights) != n:
        raise ValueError(f"weights must be one number for each of {n} references, got {len(weights)}")
    for k, value in enumerate(weights):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"weights[{k}] must be a number, got {type(value).__name__}")
    if not all(value >= 0 for value in weights) or not abs(sum(weights) - 1) <= TOLERANCE:
        raise ValueError(f"weights must be ≥ 0 and add up to 1, got {weights}")
