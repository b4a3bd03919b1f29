"""The differentiable torch operators (`torch.ops.perpo_kernels.*`): log-probs, the list loss, the linear losses.

A torch operator keeps torch.compile from looking inside, gives it shapes through a fake implementation, and carries
the derivative. The operators take packed problems (`perpo_kernels.problem`); names are checked and defaults filled in
by `perpo_kernels.functional`. Checks that read values (a label out of range) are made inside the operators, where the
data is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run an operator in the dtypes it was given: autocast was applied to its inputs and must not act inside."""

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return wrapped


class Operator:
    """A torch operator that is called as the plain function it is wherever nothing asks for an operator.

    The way through PyTorch's dispatcher takes longer on the host than all launches of a small batch. It is taken where
    something looks on: torch.compile, fake tensors, a dispatch mode, a functorch transform, a subclass of Tensor.
    """

    def __init__(self, name: str, fn: Callable[..., Any]) -> None:
        self.fn = no_autocast(fn)
        self.op = torch.library.custom_op(f"perpo_kernels::{name}", self.fn, mutates_args=())
        self.register_fake = self.op.register_fake
        self.direct: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        self.op.register_autograd(backward, setup_context=setup_context)
        fn = self.fn

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = fn(*args)
                setup_context(ctx, args, output)
                ctx.no_gradient = None  # of a list of tensors, which is one argument here
                ctx.direct = True
                return output

        Direct.backward = staticmethod(backward)  # type: ignore[method-assign]  # as the operator has it
        self.direct = Direct

    def __call__(self, *args: Any) -> Any:
        if is_observed(*args):
            return self.op(*args)
        if self.direct is None or not torch.is_grad_enabled():
            return self.fn(*args)
        return self.direct.apply(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    return lambda fn: Operator(name, fn)


def is_observed(*args: object) -> bool:
    """Whether something has to see operators: a compiler, a mode, a transform, a tensor without data or not plain."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(x, Tensor) and (x.is_meta or type(x) not in (Tensor, nn.Parameter)) for x in args)
    )


def is_traced() -> bool:
    """Whether a compiler records what is done. Up to torch 2.12 `is_compiling` is False where it traces a backward
    pass."""
    proxies = torch._C._TorchDispatchModeKey.PROXY
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(proxies) is not None


def holds_outputs_alone(ctx: Any) -> bool:
    """Whether what was saved of an operator's outputs may be overwritten in this backward pass: the functions that
    called it keep none, and no second pass will read them."""
    return getattr(ctx, "direct", False) and not torch._C._autograd._get_current_graph_task_keep_graph()


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
