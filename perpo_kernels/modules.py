"""nn.Module forms of the two losses: the numbers of the objective held in one place, the tensors given at each call."""

from typing import Any

from torch import Tensor, nn

from perpo_kernels import checks
from perpo_kernels.functional import LinearPerPOOutput, linear_perpo_loss, perpo_loss
from perpo_kernels.objectives import Objective


class PerPOLoss(nn.Module):
    """`perpo_loss` as a module; the tensors of a call are arguments of `forward` under the same names."""

    def __init__(
        self,
        beta: float | None = None,
        gamma: float | None = None,
        reduction: str = "mean",
        objective: Objective | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.objective = checks.objective(objective, beta, gamma)
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        log_probs: Tensor,  # [G, k] or [S]
        rewards: Tensor,
        ref_log_probs: Tensor | None = None,
        *,
        cu_lists: Tensor | None = None,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        pair_weights: Tensor | None = None,  # [G, k, k]
        flip_probs: Tensor | None = None,
    ) -> Tensor:
        return perpo_loss(
            log_probs,
            rewards,
            ref_log_probs,
            cu_lists=cu_lists,
            valid=valid,
            lengths=lengths,
            pair_weights=pair_weights,
            flip_probs=flip_probs,
            objective=self.objective,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, reduction={self.reduction!r}, backend={self.backend!r}"


class LinearPerPOLoss(nn.Module):
    """`linear_perpo_loss` as a module; `options` are its keyword options (temperature, softcap, max_chunk_bytes, …).

    The head stays where it is in the model: its weight is an argument of the call.
    """

    def __init__(
        self,
        beta: float | None = None,
        gamma: float | None = None,
        reduction: str = "mean",
        objective: Objective | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = checks.objective(objective, beta, gamma)
        self.reduction = reduction
        self.options = options

    def forward(
        self,
        hidden: Tensor,  # [T, H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [T]
        rewards: Tensor,  # [S]
        *,
        cu_seqlens: Tensor,  # [S + 1]
        cu_lists: Tensor,  # [G + 1]
        ref_log_probs: Tensor | None = None,  # [S]
        bias: Tensor | None = None,  # [V]
        token_weights: Tensor | None = None,  # [T]
        pair_weights: Tensor | None = None,  # [G, k, k]
        flip_probs: Tensor | None = None,  # [S]
    ) -> LinearPerPOOutput:
        return linear_perpo_loss(
            hidden,
            weight,
            labels,
            rewards,
            cu_seqlens=cu_seqlens,
            cu_lists=cu_lists,
            ref_log_probs=ref_log_probs,
            bias=bias,
            token_weights=token_weights,
            pair_weights=pair_weights,
            flip_probs=flip_probs,
            objective=self.objective,
            reduction=self.reduction,
            **self.options,
        )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.objective}, reduction={self.reduction!r}{options}"
