"""The differentiable torch operators (`torch.ops.perpo_kernels.*`): log-probs, the list loss, the linear losses.

A torch operator keeps torch.compile from looking inside, gives it shapes through a fake implementation, and carries
the derivative. The operators take packed problems (`perpo_kernels.problem`); names are checked and defaults filled in
by `perpo_kernels.functional`. Checks that read values (a label out of range) are made inside the operators, where the
data is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an operator in the dtypes it was given: autocast was applied to its inputs and must not act inside."""

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapped


def first_derivative_only(op: str) -> None:
    """Called in each backward: what it reads was saved as a constant; differentiating it would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has first derivatives only, and its backward pass was run with create_graph=True; "
            'use backend="reference" for higher derivatives'
        )


def no_gradient(constants: Sequence[Tensor | None]) -> list[None] | None:
    """What a backward pass returns for a list of tensors: torch takes a list with a None in it for no list of tensors
    at all, and wants a single None for it."""
    return None if any(x is None for x in constants) else [None] * len(constants)
