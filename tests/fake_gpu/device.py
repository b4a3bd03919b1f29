"""What a program does to a GPU, noted while it runs on fake CUDA tensors: launches, matrix products, copies.

Fake tensors raise by themselves where devices are mixed, and where the host would have to know a number that is on the
device (`.item()`, `nonzero`, a boolean index). Bodies of the project's operators run as they are; only Triton's kernels
are not launched but noted.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._library.custom_ops import _maybe_get_opdef
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from perpo_kernels.backends import triton as kernels

aten = torch.ops.aten

# Operators that are no views and launch nothing.
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resize_"}
# Where the two factors of a product stand among the arguments.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}


class Kind(NamedTuple):
    """What is noted of a tensor; the tensor itself would be kept alive."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


class Launch(NamedTuple):
    """Of a Triton kernel."""

    kernel: str
    grid: tuple[int, ...]
    current: torch.device  # where it is launched
    arguments: dict[str, Any]  # of the kernel by name, and the launch's options

    @property
    def devices(self) -> set[torch.device]:
        """Of its tensors."""
        return {x.device for x in self.arguments.values() if isinstance(x, Kind)}


class Copy(NamedTuple):
    """Between host and device."""

    source: torch.device
    target: torch.device
    elements: int
    blocking: bool  # the host waits


@functools.cache
def _is_made_of_others(func: Any) -> bool:
    """.to, .reshape and the like, which below autograd arrive whole."""
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


class FakeGpu(TorchDispatchMode):
    """Notes."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode()
        self.launches: list[Launch] = []
        self.products: list[tuple[int, int, int]] = []  # (m, k, n) of [m, k] times [k, n]
        self.copies: list[Copy] = []
        self.mixed: list[str] = []  # operators that take tensors of two devices, copies apart
        self.others: Counter[str] = Counter()  # launches of PyTorch's own kernels that are neither

    def kernels(self) -> dict[str, int]:
        """How often each Triton kernel was launched."""
        return dict(Counter(launch.kernel for launch in self.launches))

    @property
    def blocking(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.blocking]

    def clear(self) -> None:
        for notes in (self.launches, self.products, self.copies, self.mixed, self.others):
            notes.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.others[str(func)] += 1
            return func(*args, **kwargs)
        if func.namespace == "perpo_kernels":
            definition: Any = _maybe_get_opdef(func)
            with self:
                return definition._init_fn(*args, **kwargs)
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            with unset_fake_temporarily():  # of the CPU alone: the real thing
                return func(*args, **kwargs)
        out = self._run(func, args, kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        return func(*args, **kwargs)

    def _fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.mode.from_tensor(x)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.device.type == "cuda" for x in given + made):
            return
        if name in ("_to_copy", "copy_"):
            source, target = given[1 if name == "copy_" else 0], made[0]
            if source.device != target.device:
                waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])) or target.device.type == "cpu"
                self.copies.append(Copy(source.device, target.device, target.numel(), waits))
                return
        elif len({x.device for x in given if x.dim()} | {x.device for x in made if x.dim()}) > 1:
            self.mixed.append(str(func))
        if func.is_view or name in _NO_LAUNCH or not any(x.numel() for x in made):
            return
        if name in _PRODUCTS:
            (*_, m, k), (*_, n) = (x.shape for x in args[_PRODUCTS[name] :][:2])
            if n > 1:  # else a matrix times a vector
                self.products.append((m, k, n))
                return
        self.others[name] += 1


class _Recorded:
    """In the place of a Triton kernel."""

    def __init__(self, kernel: Any, notes: FakeGpu) -> None:
        self.name, self.notes = kernel.fn.__name__, notes
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.run, grid=grid)

    def run(self, *args: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
        named = {name: x for name, x in keywords.items() if name in self.signature.parameters}
        arguments = self.signature.bind(*args, **named).arguments  # TypeError: one too many, or missing
        options = {name: x for name, x in keywords.items() if name not in named}
        grid = grid(arguments) if callable(grid) else tuple(grid)
        assert math.prod(grid) > 0, f"{self.name}: an empty grid"
        current = torch.device("cuda", torch.cuda.current_device())
        noted = tree_map_only(Tensor, lambda x: Kind(x.device, x.dtype, x.shape), {**arguments, **options})
        self.notes.launches.append(Launch(self.name, grid, current, noted))


@contextmanager
def _recorded_kernels(notes: FakeGpu) -> Iterator[None]:
    changed = []
    for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(info.name)
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(kernel, "fn"):
                setattr(module, name, _Recorded(kernel, notes))
                changed.append((module, name, kernel))
    try:
        yield
    finally:
        for module, name, kernel in changed:
            setattr(module, name, kernel)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that PyTorch takes on a GPU like this; a CPU build would fall back on matrix products."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if query.device.type != "cuda":
        return _PLAIN_SDPA(query, key, value, attn_mask, **options)
    if query.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:  # which this kernel does not know
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    train = any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, train, dropout_p, is_causal, scale=scale
    )[0]


_PLAIN_SDPA = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def fake_gpu(notes: Any = None) -> Iterator[Any]:
    """Inside, tensors on CUDA are fake, and those on the CPU are real."""
    notes = notes or FakeGpu()
    with ExitStack() as stack:
        stack.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _sdpa))
        # FlexAttention as an operator, not compiled
        stack.enter_context(patch("perpo.prefix.flex_attention.has_triton", lambda: True))
        stack.enter_context(patch("perpo.prefix.flex_attention._compiled", lambda: flex.flex_attention))
        stack.enter_context(patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True))
        stack.enter_context(_recorded_kernels(notes))
        stack.enter_context(notes.mode)
        stack.enter_context(notes)
        yield notes


def move(model: nn.Module, device: str = "cuda", dtype: torch.dtype | None = None) -> None:
    """Give every parameter and buffer a fake one in its place, tied ones the same; floating-point ones of `dtype`."""
    made: dict[int, Tensor] = {}

    def new(x: Tensor) -> Tensor:
        if id(x) not in made:
            like = torch.empty(x.shape, dtype=dtype if dtype and x.is_floating_point() else x.dtype, device=device)
            made[id(x)] = nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like
        return made[id(x)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = new(x)
