"""nn.Module forms of the two losses: objective and options held in one place, the tensors given at each call."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from perpo_kernels import checks
from perpo_kernels.functional import linear_perpo_loss, perpo_loss
from perpo_kernels.objectives import Objective


class _Loss(nn.Module):
    """`function` with its objective and its keyword `options` (reduction, backend, …) held."""

    function: Callable[..., Any]

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
        self.options = {"reduction": reduction, **options}
        inspect.signature(self.function).bind_partial(**self.options)  # TypeError for an option that it does not have

    def forward(self, *tensors: Tensor, **named: Tensor | None) -> Any:
        return self.function(*tensors, **named, objective=self.objective, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([f"{self.objective}", *(f"{name}={value!r}" for name, value in self.options.items())])


class PerPOLoss(_Loss):
    """`perpo_loss` as a module; `forward` takes its tensors under the same names and returns what it returns."""

    function = staticmethod(perpo_loss)


class LinearPerPOLoss(_Loss):
    """`linear_perpo_loss` as a module; `forward` takes its tensors under the same names and returns what it returns.

    The head stays where it is in the model: its weight is an argument of the call.
    """

    function = staticmethod(linear_perpo_loss)
