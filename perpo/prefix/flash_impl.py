"""Another flash attention in the place of PyTorch's own (FA4: flash-attn-4), compared with it before it is trusted.

PyTorch has a switch for it, `torch.nn.attention.activate_flash_attention_impl`. It swaps the operators that
`perpo.prefix.flash_attention` calls, and with them those of `scaled_dot_product_attention` on CUDA, for the whole
process: vision towers use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import attention as switch

# Allowed difference to PyTorch's own kernel, relative in rms, on random numbers. Rounding makes 0.005 in bf16; another
# layout or base of the log-sum-exp about 1.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005}


def activate(name: str, device: torch.device, shared: bool) -> None:
    """Switch to it.

    Args:
        shared: whether the model that it is for shares prompts; what is not shared is not compared.

    Raises:
        ValueError: prompts are not shared, on a GPU; PyTorch does not know it; what it needs is not installed.
    """
    if device.type != "cuda" or not shared:
        what = "prompts are not shared here" if not shared else f"this is a {device.type!r} device"
        raise ValueError(
            f"flash_attention_impl={name!r}: it is for shared prompts on a CUDA device, and {what}; leave it out"
        )
    try:
        switch.activate_flash_attention_impl(name)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"flash_attention_impl={name!r}: PyTorch could not switch to it; FA4 comes with pip install '.[flash]' "
            f"({type(error).__name__}: {error})"
        ) from error


def active() -> str | None:
    return switch.current_flash_attention_impl()


@contextmanager
def own_kernels() -> Iterator[None]:
    """Inside, PyTorch's own flash attention runs, whatever was activated."""
    name = active()
    if name is not None:
        switch.restore_flash_attention_impl()
    try:
        yield
    finally:
        if name is not None:
            switch.activate_flash_attention_impl(name)


class Comparison:
    """Of what is active with PyTorch's own kernel, once for each shape, forward and backward.

    On random numbers, not on the model's: where nearly all attention goes to one token, gradients of queries and keys
    are smaller than the rounding of what they are differences of, and no two kernels agree.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[object, ...]] = set()

    @torch.compiler.disable
    def __call__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> None:
        """Raises: ValueError: it refuses these shapes or this device, or gives other numbers."""
        shape = (query.shape, key.shape, query.dtype)
        if shape in self.seen:
            return
        self.seen.add(shape)
        generator = torch.Generator(query.device).manual_seed(0)

        def random_like(x: Tensor) -> Tensor:
            return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

        inputs = [random_like(x).requires_grad_() for x in (query, key, key)]
        gradient = random_like(query)

        def results() -> list[Tensor]:
            with torch.enable_grad():
                out = attend(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

        what = f"{query.shape[1]} heads of {query.shape[-1]} over {key.shape[1]} of keys, in {query.dtype}"
        with own_kernels():
            expected = results()
        try:
            ours = results()
        except Exception as error:  # whatever it or its compiler raises
            raise ValueError(
                f"flash_attention_impl={active()!r}: it does not compute attention of {what}; leave it out "
                f"({type(error).__name__}: {error})"
            ) from error
        allowed = TOLERANCE[query.dtype]
        for name, a, b in zip(("the output", "d query", "d key", "d value"), ours, expected, strict=True):
            difference = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if not difference <= allowed:
                raise ValueError(
                    f"flash_attention_impl={active()!r}: in attention of {what}, {name} is not what PyTorch's own "
                    f"kernel gives (relative difference {difference:.2g}, allowed {allowed:g}); leave it out"
                )
